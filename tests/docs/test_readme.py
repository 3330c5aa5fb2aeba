"""The README's code runs, and what it lists is what there is."""

import re
from pathlib import Path

import pytest

import upcast
from upcast.cli.main import _parser
from upcast.core import config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("call", ["upcast.plan(model)", "upcast.search(model"])
def test_the_code_in_the_readme_runs(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in BLOCKS if call in block)
    exec(compile(block, "README.md", "exec"), {})


def test_every_public_function_is_in_the_readme() -> None:
    text = " ".join(BLOCKS)
    functions = [name for name in upcast.__all__ if name.islower()]
    assert {"patch", "plan", "unpatch", "from_pretrained", "diagnose", "search", "ablate", "certify"} < set(functions)
    for name in functions:
        assert f"upcast.{name}(" in (README if name == "certify" else text)


def test_every_variable_is_in_the_readme() -> None:
    for variable in config.VARIABLES:
        assert f"| `{variable.name}` |" in README


def test_every_command_is_in_the_readme_and_the_changelog() -> None:
    commands = _parser()._subparsers._group_actions[0].choices
    changelog = (ROOT / "CHANGELOG.md").read_text()
    for command in commands:
        assert f"python -m upcast {command}" in README
        assert f"python -m upcast {command}" in changelog


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README))
def test_links_in_the_readme_exist(link: str) -> None:
    assert (ROOT / link).exists()

"""What the pages show runs: every block of Python, and every command has the options that it is given."""

import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.docs import stand_ins
from tests.docs.pages import PAGES, ROOT, TOP, Block, blocks, name_of
from upcast.core import config, messages

pytest.importorskip("litgpt")
pytest.importorskip("diffusers")

PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
NOT_RUN = 3  # blocks that may say why they are not run here; a page that shows what runs is worth more
LANGUAGES = {"python", "", "text"}  # one without a name holds commands
VARIABLES = {variable.name for variable in config.VARIABLES} | {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"}
INLINE = re.compile(r"(?<!`)`((?:python (?:-m upcast |benchmarks/|examples/|tools/)|make )[^`]*)`(?!`)")
LITGPT = {"generate", "chat", "serve"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    stand_ins.write(folder)
    return folder


@pytest.fixture
def settings_kept() -> Iterator[None]:
    """What a page sets for the whole process is as it was afterwards."""
    messages._follow_the_environment()  # otherwise the level may be one that a test before asked for
    logger, threads = logging.getLogger("upcast"), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers")  # Lightning's
@pytest.mark.parametrize("page", PYTHON, ids=name_of)
@pytest.mark.usefixtures("no_other_gpt", "settings_kept")
def test_the_python_of_a_page_runs(page: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.not_run:
            code = "\n" * block.line + block.code  # so that an error names the page's line
            exec(compile(code, str(page), "exec"), namespace)


def test_few_blocks_are_not_run() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.not_run]
    assert len(skipped) <= NOT_RUN, [f"{block}: {block.not_run}" for block in skipped]


@pytest.mark.parametrize("page", [*PAGES, *(page for page in TOP if page.name != "CHANGELOG.md")], ids=name_of)
def test_commands_have_these_options(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: {block.language}"
    for where, command in _commands(page):
        try:
            _check(shlex.split(command, comments=True))
        except (AssertionError, SystemExit) as error:
            pytest.fail(f"{where}: {command}: {error}")


def _commands(page: Path) -> Iterator[tuple[object, str]]:
    for block in blocks(page):
        if block.language == "":
            yield from _lines(block)
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for match in INLINE.finditer(text):
        yield name_of(page), " ".join(match[1].split())


def _lines(block: Block) -> Iterator[tuple[object, str]]:
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.strip():
            yield block, line


def _check(words: list[str]) -> None:
    """Raise unless the command is one that there is, with options that it has."""
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        variable = words.pop(0).partition("=")[0]
        assert variable in VARIABLES | _build_variables(), f"no variable {variable}"
    if not words:
        return
    assert words[0] in CHECKS, f"{words[0]} is no command that is known here"
    CHECKS[words[0]](words[1:])


def _build_variables() -> set[str]:
    return {"UPCAST_REPOSITORY", "UPCAST_CACHE", "ARGS", "JOBS", "ROWS"}


def _python(words: list[str]) -> None:
    if words[:2] == ["-m", "upcast"]:
        _upcast(words[2:])
    elif words[0] == "-m":
        assert _has_module(words[1]), f"no module {words[1]}"
    elif words[0] == "benchmarks/run.py":
        from benchmarks.run import build_parser

        _parse(build_parser().parse_args, words[1:])
    elif "/" in words[0]:
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
    else:
        assert words == ["script.py"] or words[0].startswith("-")  # the reader's own


def _upcast(words: list[str]) -> None:
    from upcast.cli.main import _parser

    if len(words) == 1 and words[0] != "status":  # a command that is named in a sentence, without its arguments
        words = [*words, "--help"] if words[0] != "--help" else words
    _parse(_parser().parse_args, words)


def _parse(parse: Callable[[list[str]], object], words: list[str]) -> None:
    code: object = 0
    try:
        parse([word for word in words if word != "..."])
    except SystemExit as end:
        code = end.code
    assert not code, "its parser refuses that"


def _has_module(name: str) -> bool:
    return any((ROOT / name.replace(".", "/")).with_suffix(end).exists() for end in ("", ".py")) or name == "pip"


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.module
    assert options.training_script == "upcast"
    _upcast(options.training_script_args)


def _make(words: list[str]) -> None:
    rules = "".join((ROOT / name).read_text() for name in ("Makefile", "kernels.mk", "platforms.mk"))
    for word in words:
        if "=" not in word:
            assert re.search(rf"^{re.escape(word)}:", rules, re.MULTILINE), f"no target {word}"


def _pip(words: list[str]) -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"(?:torch-upcast|\.)\[([\w,]+)\]", " ".join(words)):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"no extra {extra}"


def _litgpt(words: list[str]) -> None:
    assert words[0] in LITGPT | {"finetune_lora", "merge_lora", "download"}


def _pytest(words: list[str]) -> None:
    for word in words:
        assert "/" not in word or (ROOT / word).exists(), f"no {word}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": _python,
    "upcast": _upcast,
    "torchrun": _torchrun,
    "make": _make,
    "pip": _pip,
    "litgpt": _litgpt,
    "pytest": _pytest,
    "curl": lambda words: None,
}


@pytest.mark.parametrize(
    "command",
    ["python -m upcast convrt DIR", "python -m upcast certify DIR --windws 3", "make tests", "torchrun -m upcast serve",
     "python benchmarks/run.py --swite serve", "UPCAST_KEPT=a python script.py", "pip install 'torch-upcast[lit]'"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        _check(shlex.split(command))

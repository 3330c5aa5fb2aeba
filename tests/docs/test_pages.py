"""The pages name all there is: public names, commands, options, variables, errors; and they do it in public words."""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import upcast
from tests.docs.pages import DOCS, PAGES, README, ROOT, TOP, blocks, name_of
from upcast.analysis.result import Result
from upcast.cli.main import _parser, main
from upcast.core import config

API = (DOCS / "api.md").read_text("utf-8")
CLI = (DOCS / "cli.md").read_text("utf-8")
_GROUP: Any = _parser()._subparsers
COMMANDS: dict[str, Any] = _GROUP._group_actions[0].choices
CODE = "\n".join(block.code for page in PAGES for block in blocks(page) if block.language == "python")
README_LINES = range(120, 161)
PRIVATE = re.compile(r"\b(tiles?|twins?|slots?|watch(es|ed|ing)?)\b", re.IGNORECASE)  # words of the code base alone
MADE_BY_OTHERS = {"coverage.md", "versions.md"}  # names of models, written by programs
RAISED = re.compile(r"(?<!class )\b(?:UpcastError|RankError|KernelError|LostRank|_NoSourceError)\(")
TABLES_OF_FUNCTIONS = ("op_classes.py", "view_ops.py", "composite_ops.py")  # torch.tile is one
PICTURE = re.compile(r"!\[([^]]*)\]\(([^)]+)\)|<img ")
MADE_BY_A_RUN = {"benchmarks/results"}
PASSED_ON = 12  # errors that only pass on the text of another
ALT = 15  # characters: less than that says nothing
COLUMNS = 87  # of code


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) in README_LINES


def test_every_public_name_has_its_row_and_its_entry() -> None:
    rows = [line.split("|") for line in API.splitlines() if line.startswith("| `")]
    first = {re.match(r" `(\w+)", row[1]).group(1) for row in rows}  # type: ignore[union-attr]
    results = {re.sub(r"\W", "", row[3]) for row in rows if len(row) > 4} - {""}
    assert first | results == {*upcast.__all__}
    assert results == {name for name in upcast.__all__ if _is_result(name)}
    assert sorted(re.findall(r"^::: upcast\.(\w+)$", API, re.MULTILINE)) == sorted(upcast.__all__)


def _is_result(name: str) -> bool:
    value = getattr(upcast, name)
    return isinstance(value, type) and issubclass(value, Result)


def test_every_public_function_is_called_on_a_page() -> None:
    functions = [name for name in upcast.__all__ if name.islower()]
    assert {"patch", "plan", "unpatch", "from_pretrained", "diagnose", "search", "ablate", "certify"} < set(functions)
    assert [name for name in functions if f"upcast.{name}(" not in CODE] == []


def test_every_variable_has_its_row() -> None:
    page = (DOCS / "environment.md").read_text("utf-8")
    for variable in config.VARIABLES:
        assert f"| `{variable.name}` |" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_has_its_place(command: str) -> None:
    _, _, section = CLI.partition(f"\n## {command}\n")
    section = section.partition("\n## ")[0]
    assert f"python -m upcast {command}" in section
    assert f"python -m upcast {command}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    options = [option for action in COMMANDS[command]._actions for option in action.option_strings[-1:]]
    assert [option for option in options if option != "--help" and option not in section] == []


def test_the_status_that_is_shown_has_the_topics_of_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    _, _, shown = CLI.partition("\n## status\n")[2].partition("```text\n")
    topics = [line[:18] for line in shown.partition("```")[0].splitlines() if line[:18].strip()]
    assert len(topics) > 5
    assert [line[:18] for line in capsys.readouterr().out.splitlines()[: len(topics)]] == topics


def test_the_check_that_is_shown_has_the_topics_of_check() -> None:
    _, _, shown = CLI.partition("\n## check\n")[2].partition("```text\n")
    topics = [line[:15].strip() for line in shown.partition("```")[0].splitlines()]
    source = (ROOT / "src" / "upcast" / "cli" / "check.py").read_text("utf-8")
    assert re.findall(r'\(\s*"([a-z][a-z0-9 ]+)",\s', source.partition("def _rows")[2]) == [*filter(None, topics)]


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=name_of)
def test_links_exist(page: Path) -> None:
    """The site's strict build looks at those of docs/, in the site; this at how they are seen in the repository."""
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?!http|#|mailto)([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        notebook = page.parent / link.replace(".md", ".ipynb")
        assert (page.parent / link).exists() or notebook.exists(), link


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it tells of files that are gone
        return
    named = re.findall(r"`((?:tests|tools|examples|benchmarks|docs|csrc|src)/[\w./-]+)", page.read_text("utf-8"))
    assert [path for path in named if not (ROOT / path).exists() and path not in MADE_BY_A_RUN] == []


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=name_of)
def test_pictures_say_what_they_show(page: Path) -> None:
    for picture in PICTURE.finditer(page.read_text("utf-8")):
        assert len(picture[1] or "") >= ALT, picture[0]


@pytest.mark.parametrize("page", [page for page in (*PAGES, *TOP) if page.name not in MADE_BY_OTHERS], ids=name_of)
def test_pages_have_no_private_word(page: Path) -> None:
    assert [match[0] for match in PRIVATE.finditer(page.read_text("utf-8"))] == []


@pytest.mark.parametrize("name", upcast.__all__)
def test_docstrings_have_no_private_word(name: str) -> None:
    value = getattr(upcast, name)
    texts = [inspect.getdoc(value) or ""]
    if isinstance(value, type):
        texts += [inspect.getdoc(member) or "" for key, member in vars(value).items() if not key.startswith("_")]
    assert [match[0] for text in texts for match in PRIVATE.finditer(text)] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_private_word(command: str) -> None:
    assert [match[0] for match in PRIVATE.finditer(COMMANDS[command].format_help())] == []


def test_a_private_word_is_found() -> None:
    assert PRIVATE.search("upcasts a tile")
    assert PRIVATE.search("it Watches")
    assert not PRIVATE.search("versatile")


def test_messages_have_no_private_word() -> None:
    """Texts of the sources with more than one word that are no docstrings: what may be shown to somebody."""
    paths = [path for path in (ROOT / "src").rglob("*.py") if path.name not in TABLES_OF_FUNCTIONS]
    said = [text for path in paths for text in _messages(path) if " " in text.strip()]
    assert len(said) > 500
    assert [text for text in said if PRIVATE.search(text)] == []


def _messages(path: Path) -> list[str]:
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [str(node.value) for node in texts if id(node) not in docs]


@pytest.fixture(scope="module")
def errors_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "tools" / "errors_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["errors_page"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_page_of_errors_is_current(errors_page: ModuleType) -> None:
    assert (DOCS / "errors.md").read_text("utf-8") == errors_page.page(errors_page.entries()), "run make docs"


def test_the_page_of_errors_shows_what_is_filled_in() -> None:
    page = (DOCS / "errors.md").read_text("utf-8")
    assert not set("{}") & set(page)  # MkDocs takes braces at the end of a cell for attributes
    assert page.count("*name*") > 5


def test_the_page_of_errors_is_complete(errors_page: ModuleType) -> None:
    """Counted in another way than the page is made: by the text of the sources."""
    sources = [path.read_text("utf-8") for path in (ROOT / "src" / "upcast").rglob("*.py")]
    found = sum(len(RAISED.findall(source)) for source in sources)
    made, silent = errors_page.counted()
    assert made + silent == found
    assert silent <= PASSED_ON


def test_every_error_says_what_to_do(errors_page: ModuleType) -> None:
    assert [entry.found for entry in errors_page.entries() if not entry.remedy] == []


def test_code_fits_a_page_on_a_laptop() -> None:
    """At 1280 pixels the site shows 87 columns beside its two menus; what is longer scrolls sideways."""
    code = [block for page in PAGES if page != README for block in blocks(page) if block.language == "python"]
    assert len(code) > 30
    assert [f"{block}: {line}" for block in code for line in block.code.splitlines() if len(line) > COLUMNS] == []

"""What upcast says goes through logging: once, at the level that is asked for, by rank 0."""

import io
import logging
import sys
import warnings

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import Run
from upcast.core import messages

LINE = "upcast: Sequential "


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8))


@pytest.fixture(autouse=True)
def level() -> None:
    messages._followed.clear()  # a test before this one may have set it


LEVELS = {  # UPCAST_VERBOSE -> lines: the one line, the plan's title
    "0": (0, 0),
    "1": (1, 0),
    "2": (1, 1),
}


@pytest.mark.parametrize("verbose", LEVELS)
def test_the_variable_sets_the_level(
    verbose: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPCAST_VERBOSE", verbose)
    upcast.patch(model())
    said = capsys.readouterr().err
    assert (said.count(LINE), said.count("max error")) == LEVELS[verbose]


def test_the_program_may_set_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    upcast.patch(model())
    assert capsys.readouterr().err.count(LINE) == 1
    root = logging.getLogger("upcast")
    root.setLevel(logging.ERROR)
    upcast.patch(model())
    root.setLevel(logging.INFO)
    assert capsys.readouterr().err == ""


def test_the_record_names_the_module_and_the_level(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "upcast"):
        upcast.patch(model())
    (line,) = [record for record in caplog.records if record.levelno == logging.INFO]
    assert line.name == "upcast.patching.engine"
    assert line.getMessage().startswith("Sequential ")


HANDLERS = {  # where the program's own handler writes -> lines on standard error, and in the handler's stream
    "terminal": (1, 0),
    "elsewhere": (1, 1),
    "none": (1, 0),
}


@pytest.mark.parametrize("where", HANDLERS)
def test_no_line_appears_twice(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = io.StringIO()
    handler = logging.StreamHandler(sys.stderr if where == "terminal" else elsewhere)
    handler.setFormatter(logging.Formatter("mine: %(message)s"))
    if where != "none":
        logging.root.addHandler(handler)
    try:
        upcast.patch(model())
    finally:
        logging.root.removeHandler(handler)
    said = capsys.readouterr().err
    assert (said.count("Sequential "), elsewhere.getvalue().count("Sequential ")) == HANDLERS[where]
    assert said.startswith("mine: " if where == "terminal" else LINE)


RANKS = [({}, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 1), ({"RANK": "1", "WORLD_SIZE": "2"}, 0)]


@pytest.mark.parametrize(("variables", "lines"), RANKS, ids=str)
def test_rank_0_speaks(
    variables: dict[str, str], lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    upcast.patch(model())
    assert capsys.readouterr().err.count(LINE) == lines


def test_what_a_user_should_change_is_a_warning_once_at_the_users_line() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            messages.warn("UPCAST_KEEP: 'x' matches no parameter")
    assert [str(each.message) for each in caught] == ["upcast: UPCAST_KEEP: 'x' matches no parameter"]
    assert caught[0].filename == __file__


def test_where_warnings_are_errors_it_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        messages.warn("something")
    assert capsys.readouterr().err == "upcast: something\n"


def test_a_program_that_configures_logging_decides_how_it_looks(python: Run) -> None:
    script = "import logging; logging.basicConfig(format='%(name)s %(levelname)s %(message)s', level='INFO')\n"
    script += "import upcast; from torch import nn; upcast.patch(nn.Sequential(nn.Linear(8, 8)))"
    said = [line for line in python("-W", "ignore", "-c", script).stderr.splitlines() if "Sequential" in line]
    assert len(said) == 1
    assert said[0].startswith("upcast.patching.engine INFO Sequential ")

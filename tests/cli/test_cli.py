"""The command line, the environment, and the public names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import upcast
from tests.conftest import Run
from upcast.cli.main import main
from upcast.core import config, console

SCRIPT = """
import sys
print(sys.argv[1:], __name__, 'upcast' in sys.modules)
import litgpt
print('upcast.integrations.activation' in sys.modules)
"""

VALID = [
    ({}, config.Config(False, "safe", "auto", "auto", None, 1)),
    ({"UPCAST": "1"}, config.Config(True, "safe", "auto", "auto", None, 1)),
    ({"UPCAST": "True"}, config.Config(True, "safe", "auto", "auto", None, 1)),
    ({"UPCAST": "on", "UPCAST_VERBOSE": "2"}, config.Config(True, "safe", "auto", "auto", None, 2)),
    ({"UPCAST_STORAGE": "packed"}, config.Config(False, "safe", "auto", "auto", None, 1, storage="packed")),
    ({"UPCAST_KV_CACHE": "float32"}, config.Config(False, "safe", "auto", "auto", "float32", 1)),
    (
        {"UPCAST": "FALSE", "UPCAST_KERNELS": " portable "},
        config.Config(False, "safe", "portable", "auto", None, 1),
    ),
]

INVALID = [
    ({"UPCAST": "maybe"}, "UPCAST='maybe' in the environment; it takes one of '1', 'true', 'on'"),
    ({"UPCAST_POLICY": "brave"}, "(?s)UPCAST_POLICY='brave' .*safe"),
    ({"UPCAST_KERNELS": "fast"}, "UPCAST_KERNELS='fast' .* 'auto', 'native', 'portable'"),
    (
        {"UPCAST_ISA": "avx9"},
        "UPCAST_ISA='avx9' .* 'x86-64', 'x86-64-v3', 'x86-64-v4', 'x86-64-v4-amx', 'x86-64-v4-amx-fp16', 'aarch64'",
    ),
    ({"UPCAST_KV_CACHE": "int8"}, "UPCAST_KV_CACHE='int8' .* 'float16', 'float32'"),
    ({"UPCAST_STORAGE": "int8"}, "UPCAST_STORAGE='int8' .* 'float16', 'packed', 'auto', 'float32'"),
    ({"UPCAST_VERBOSE": "3"}, "UPCAST_VERBOSE='3' .* '0', '1', '2'"),
]


@pytest.mark.parametrize(("environ", "want"), VALID)
def test_environment(environ: dict[str, str], want: config.Config) -> None:
    assert config.read(environ) == want


@pytest.mark.parametrize(("environ", "message"), INVALID)
def test_wrong_values_list_the_valid_ones(environ: dict[str, str], message: str) -> None:
    with pytest.raises(upcast.UpcastError, match=message):
        config.read(environ)


def test_run_a_script(python_with_libraries: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    result = python_with_libraries("-m", "upcast", "run", "script.py", "--flag", "x")
    assert result.stdout.splitlines() == ["['--flag', 'x'] __main__ True", "True"], result.stderr


def test_run_a_module(python_with_libraries: Run, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    result = python_with_libraries("-m", "upcast", "run", "-m", "program", "y")
    assert result.stdout.splitlines() == ["['y'] __main__ True", "True"], result.stderr


ERRORS = [
    (["run", "nothing.py"], {}, "upcast: no file nothing.py; run takes a Python script"),
    (["run", "nothing.py"], {"UPCAST_KERNELS": "fast"}, "upcast: UPCAST_KERNELS='fast'"),
    (["status"], {"UPCAST": "maybe"}, "upcast: UPCAST='maybe'"),
    (["fly"], {}, "invalid choice: 'fly'"),
    ([], {}, "the following arguments are required: COMMAND"),
]


@pytest.mark.parametrize(("arguments", "variables", "message"), ERRORS)
def test_usage_errors(
    arguments: list[str],
    variables: dict[str, str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UPCAST", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("_upcast_startup.start", lambda: None)
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_status_says_what_is_active_and_why(python: Run, python_with_libraries: Run) -> None:
    off, on = python_with_libraries("-m", "upcast", "status"), python("-m", "upcast", "status", UPCAST="1")
    assert "no: UPCAST is not set to 1" in off.stdout
    assert "yes: UPCAST is on" in on.stdout
    for text in (upcast.__version__, "upcast.pth", "litgpt when imported", "kernels", "UPCAST_VERBOSE"):
        assert text in on.stdout
    isolated = python("-S", "-c", "pass", UPCAST="1")
    assert isolated.returncode == 0


@pytest.mark.parametrize(("gone", "said"), [(True, ""), (False, "upcast: standard output: [Errno 28] No space left")])
def test_where_nobody_takes_the_answer(gone: bool, said: str, tmp_path: Path) -> None:
    ends = os.pipe() if gone else (os.open("/dev/null", os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    os.close(ends[0])
    command = [sys.executable, "-m", "upcast", "status"]
    result = subprocess.run(command, cwd=tmp_path, stdout=ends[1], stderr=subprocess.PIPE, text=True, check=False)
    os.close(ends[1])
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == bool(said)
    assert result.stderr.startswith(said)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "run" in text
    assert "status" in text


def test_public_names() -> None:
    public = {name for name in vars(upcast) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(upcast, name)).__name__ == "module"}
    assert (public - modules) | upcast._ON_DEMAND.keys() == set(upcast.__all__)
    assert all(getattr(upcast, name).__doc__ for name in upcast.__all__)


COMMANDS = {"module": ["-m", "upcast"], "script": ["-c", "import _upcast_startup as s; raise SystemExit(s.command())"]}


@pytest.mark.parametrize("how", COMMANDS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_needs_neither_torch_nor_wrapt(python: Run, how: str, option: str) -> None:
    result = python("-X", "importtime", *COMMANDS[how], option)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "upcast.cli.main" in imported
    assert not imported & {"torch", "wrapt", "upcast.api"}
    assert result.stdout.startswith("usage:" if option == "--help" else f"torch-upcast {upcast.__version__}")


def test_who_imports_upcast_has_its_operations(python_with_libraries: Run) -> None:
    script = "import upcast, torch; print(torch.ops.upcast.linear.default.name())"
    assert python_with_libraries("-c", script).stdout.strip() == "upcast::linear"


def test_the_choices_of_generate_are_those_that_there_are() -> None:
    from upcast.cli import generate
    from upcast.distributed.collectives import WIRES

    assert set(generate.WIRES) == set(WIRES)


def test_status_as_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["status"])
    listed = capsys.readouterr().out
    main(["status", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"upcast", "active", "kernels", "loaders", "libraries", "variables"} <= found.keys()
    for topic in ("upcast", "active", "kernels", "fused forwards"):
        assert found[topic] in listed
    assert found["variables"].keys() == {variable.name for variable in config.VARIABLES}


MODULES = {  # what `run -m` says of it, as Python does
    "no_such_module": "No module named no_such_module",
    "json.no_such": "No module named json.no_such",
    "email": "No module named email.__main__; 'email' is a package and cannot be directly executed",
    "nothing.at.all": "Error while finding module specification for 'nothing.at.all' "
    "(ModuleNotFoundError: No module named 'nothing')",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_is_not_there_is_told_as_python_does(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UPCAST", "0")
    monkeypatch.setattr("_upcast_startup.start", lambda: None)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["run", "-m", name]) == 1
    said = capsys.readouterr().err
    assert said == f"{sys.executable}: {MODULES[name]}\n"
    plain = subprocess.run([sys.executable, "-m", name], capture_output=True, text=True, check=False)
    assert (plain.returncode, plain.stderr) == (1, said)


ROWS = [("start-up file", "/a/path/that/is/longer/than/the/terminal/is/wide.pth"), ("threads", "2"), ("x", "a b " * 20)]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_listing_fits_its_width_and_keeps_every_word(width: int) -> None:
    text = console.listing(ROWS, width)
    assert text.split() == " ".join(f"{topic} {finding}" for topic, finding in ROWS).split()
    assert all(len(line) <= width or len(line.split()) <= 2 for line in text.splitlines())
    assert console.listing(ROWS, 0).count("\n") == len(ROWS) - 1


def test_tables_align() -> None:
    assert console.table(("a", "b"), [("xx", "1"), ("y", "22")], right=(1,)) == "a    b\n--  --\nxx   1\ny   22"

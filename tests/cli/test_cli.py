"""The command line, the environment, and the public names."""

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
    ({"UPCAST_ISA": "avx9"}, "UPCAST_ISA='avx9' .* 'x86-64', 'x86-64-v3', 'x86-64-v4', 'x86-64-v4-amx', 'aarch64'"),
    ({"UPCAST_KV_CACHE": "int8"}, "UPCAST_KV_CACHE='int8' .* 'float16', 'float32'"),
    ({"UPCAST_VERBOSE": "3"}, "UPCAST_VERBOSE='3' .* '0', '1', '2'"),
]


@pytest.mark.parametrize(("environ", "want"), VALID)
def test_environment(environ: dict[str, str], want: config.Config) -> None:
    assert config.read(environ) == want


@pytest.mark.parametrize(("environ", "message"), INVALID)
def test_wrong_values_list_the_valid_ones(environ: dict[str, str], message: str) -> None:
    with pytest.raises(upcast.UpcastError, match=message):
        config.read(environ)


def test_run_a_script(python: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    result = python("-m", "upcast", "run", "script.py", "--flag", "x")
    assert result.stdout.splitlines() == ["['--flag', 'x'] __main__ True", "True"], result.stderr


def test_run_a_module(python: Run, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    result = python("-m", "upcast", "run", "-m", "program", "y")
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


def test_status_says_what_is_active_and_why(python: Run) -> None:
    off, on = python("-m", "upcast", "status"), python("-m", "upcast", "status", UPCAST="1")
    assert "no: UPCAST is not set to 1" in off.stdout
    assert "yes: UPCAST is on" in on.stdout
    for text in (upcast.__version__, "upcast.pth", "litgpt.api when imported", "kernels", "UPCAST_VERBOSE"):
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


def test_tables_align() -> None:
    assert console.table(("a", "b"), [("xx", "1"), ("y", "22")], right=(1,)) == "a    b\n--  --\nxx   1\ny   22"

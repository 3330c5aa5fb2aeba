"""UPCAST=1: on means on, off means off, and nothing of ours breaks a start or an import."""

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import wrapt

import _upcast_startup
from tests.conftest import Run
from upcast.integrations import activation

SOURCE = Path(__file__).parents[2] / "src"
STAND_INS = (
    *("litgpt/__init__.py", "litgpt/api.py", "transformers/__init__.py", "transformers/modeling_utils.py"),
    *("transformers/pipelines/__init__.py", "transformers/pipelines/base.py"),
)
TARGET = "import sys; import {}; print('wrapt' in sys.modules, 'upcast' in sys.modules)"


@pytest.fixture
def lean_python(python: Run, tmp_path: Path) -> Run:
    """As `python`; LitGPT and Transformers are empty modules there: what theirs import takes seconds a start."""
    folder = tmp_path / "stand_ins"
    for name in STAND_INS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        folders = [variables[name] for name in ("PYTHONPATH",) if name in variables]
        return python(*arguments, **{**variables, "PYTHONPATH": os.pathsep.join([*folders, str(folder)])})

    return run


def imported(stderr: str) -> set[str]:
    """Module names in the output of -X importtime."""
    return {line.split("|")[-1].strip() for line in stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("variables", [{}, {"UPCAST": "0"}, {"UPCAST": "off"}, {"UPCAST": ""}], ids=str)
def test_with_upcast_off_start_up_imports_one_file_of_ours(python: Run, variables: dict[str, str]) -> None:
    modules = imported(python("-X", "importtime", "-c", "pass", **variables).stderr)
    assert "site" in modules
    ours = {name for name in modules if "upcast" in name or name.split(".")[0] in ("wrapt", "torch")}
    assert {name for name in ours if not name.startswith("_editable")} == {"_upcast_startup"}


def test_that_file_imports_nothing_else(python: Run) -> None:
    script = "import os, sys; before = set(sys.modules); import _upcast_startup as ours; ours.start(); "
    script += "print(*sorted(set(sys.modules) - before))"
    assert python("-S", "-c", f"import sys; sys.path.append({str(SOURCE)!r}); {script}").stdout.split() == [
        "_upcast_startup"
    ]


KNOWN = "from transformers.quantizers import auto; print('upcast' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING)"


@pytest.mark.parametrize(
    ("value", "known"),
    [(None, True), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("off", False), ("1", True)))],
)
def test_transformers_hears_of_us_unless_upcast_is_switched_off(python: Run, value: str | None, known: bool) -> None:
    found = python("-c", KNOWN, **({} if value is None else {"UPCAST": value}))
    assert found.stdout.strip() == str(known), found.stderr


LATE = """
import os, sys
{before}
import transformers.modeling_utils
{after}
print("upcast" in sys.modules)
"""
SET = "os.environ['UPCAST'] = '1'"
TIMES = {  # before, after the import of the library -> upcast hooks in; it says that it is too late
    "in time": (SET, "", "True", False),
    "too late": ("", SET, "False", True),
    "never": ("", "", "False", False),
    "for the next library": ("", SET + "; import litgpt.api", "True", False),
}


@pytest.mark.parametrize("when", TIMES)
def test_a_program_may_set_the_variable_until_the_library_is_imported(lean_python: Run, when: str) -> None:
    before, after, hooked, says = TIMES[when]
    done = lean_python("-c", LATE.format(before=before, after=after))
    assert done.stdout.strip() == hooked, done.stderr
    assert done.stderr.count("UPCAST was set after transformers had been imported") == says


def test_the_check_above_can_fail(python: Run) -> None:
    modules = imported(python("-X", "importtime", "-c", "pass", UPCAST="1").stderr)
    assert {"_upcast_startup", "wrapt"} <= modules
    assert "torch" not in modules


def test_with_upcast_off_torch_has_none_of_our_hooks(python: Run) -> None:
    script = "import torch, sys; ours = [m for m in sys.modules if 'upcast' in m or m == 'wrapt']; "
    script += "print([m for m in ours if not m.startswith(('_editable', '_upcast_startup'))], "
    script += "[f for f in sys.meta_path if 'wrapt' in type(f).__module__])"
    found = python("-c", script).stdout.strip()
    assert found == "[] []"


def test_the_hook_waits_for_its_libraries(lean_python: Run) -> None:
    assert lean_python("-c", TARGET.format("torch"), UPCAST="1").stdout.split() == ["True", "False"]
    assert lean_python("-c", TARGET.format("litgpt.api"), UPCAST="1").stdout.split() == ["True", "True"]


def test_both_lists_of_libraries_agree() -> None:
    assert tuple(activation.ACTIVATIONS) == _upcast_startup.TARGETS


def test_a_wrong_value_warns_once_and_breaks_nothing(python_with_libraries: Run) -> None:
    result = python_with_libraries("-c", "import litgpt, transformers; print('fine')", UPCAST="maybe")
    assert result.stdout.strip() == "fine"
    assert result.stderr.count("upcast is not active") == 1
    assert "UPCAST='maybe' in the environment; it takes one of '1', 'true'" in result.stderr


def test_a_failure_inside_a_hook_warns_and_breaks_nothing(lean_python: Run) -> None:
    fails = "import upcast.integrations.activation as s; s.ACTIVATIONS['litgpt.api'] = lambda m: 1 / 0"
    script = f"{fails}; import litgpt.api; print('fine')"
    result = lean_python("-c", script, UPCAST="1")
    assert result.stdout.strip() == "fine"
    assert result.stderr.count("upcast is not active for litgpt.api: division by zero") == 1


BREAKING = {
    "a wrong value": ({"UPCAST": "maybe"}, "", "upcast is not active"),
    "a broken wrapt": ({"UPCAST": "1"}, "1 / 0", "wrapt cannot be used (ZeroDivisionError: division by zero)"),
    "a wrapt of another kind": ({"UPCAST": "1"}, "register_post_import_hook = None", "wrapt cannot be used (TypeError"),
    "no wrapt": ({"UPCAST": "1"}, "raise ImportError('none')", "wrapt cannot be used (ImportError: none)"),
}


@pytest.mark.parametrize("strictness", ["default", "error"])
@pytest.mark.parametrize("case", BREAKING)
def test_nothing_breaks_a_start_or_an_import(lean_python: Run, tmp_path: Path, case: str, strictness: str) -> None:
    variables, wrapt, said = BREAKING[case]
    if wrapt:
        (tmp_path / "wrapt.py").write_text(wrapt)
    program = "import transformers.modeling_utils; print('fine')" if not wrapt else "print('fine')"
    path = {"PYTHONPATH": str(tmp_path)} if wrapt else {}
    result = lean_python("-W", strictness, "-W", "ignore::DeprecationWarning", "-c", program, **variables, **path)
    assert result.stdout.strip() == "fine", result.stderr
    assert result.stderr.count(said) == 1
    assert "Traceback" not in result.stderr


# In an editable install ours is found before the path is searched.
ON_THE_PATH = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; "
STRANGERS = {  # what else may be imported as upcast: PyPI's project of that name for one
    "a package": ("upcast/__init__.py", "1 / 0"),
    "a package that says nothing": ("upcast/__init__.py", ""),
    "a module": ("upcast.py", "import sys"),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_another_project_in_our_place_is_named(lean_python: Run, tmp_path: Path, case: str) -> None:
    name, content = STRANGERS[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    said = f"'import upcast' finds another project of that name ({tmp_path / name}). Run: pip uninstall upcast"
    program = f"{ON_THE_PATH}import transformers.modeling_utils, transformers.pipelines.base; print('fine')"
    result = lean_python("-c", program, UPCAST="1", PYTHONPATH=str(tmp_path))
    assert result.stdout.strip() == "fine", result.stderr
    assert result.stderr.count(said) == 1
    command = f"{ON_THE_PATH}import _upcast_startup; raise SystemExit(_upcast_startup.command())"
    result = lean_python("-c", command, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert said in result.stderr


def test_child_processes_inherit_it(python: Run) -> None:
    child = TARGET.format("os")
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    assert python("-c", script, UPCAST="1").stdout.split() == ["True", "False"]
    assert python("-c", script).stdout.split() == ["False", "False"]


def test_the_pth_line_runs_from_a_site_folder(tmp_path: Path) -> None:
    """As site does it, in a folder of our own: a process without the installed start-up file (-S)."""
    for name in ("upcast.pth", "_upcast_startup.py"):
        (tmp_path / name).write_text((SOURCE / name).read_text())
    script = f"""
import sys, site
sys.path += {[*site.getsitepackages(), str(Path(wrapt.__file__).parents[1])]!r}
site.addsitedir({str(tmp_path)!r})
site.addsitedir({str(tmp_path)!r})  # twice, as some set-ups do
print("_upcast_startup" in sys.modules, len(__import__("wrapt.importer").importer._post_import_hooks))
"""
    for value, want in (("1", ["True", str(len(_upcast_startup.TARGETS))]), ("", ["True", "0"])):
        result = subprocess.run(
            [sys.executable, "-S", "-c", script], env={"UPCAST": value}, capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == want


def test_the_start_up_files_are_one_readable_line_each() -> None:
    pth = (SOURCE / "upcast.pth").read_text().splitlines()
    assert pth == ["import _upcast_startup; _upcast_startup.start()"]
    assert (SOURCE / "upcast.start").read_text().split() == ["_upcast_startup:start"]
    assert callable(_upcast_startup.start)


def test_the_start_up_files_are_installed() -> None:
    folders = [Path(folder) for folder in site.getsitepackages()]
    for name in ("upcast.pth", "upcast.start", "_upcast_startup.py"):
        (installed,) = [folder / name for folder in folders if (folder / name).is_file()]
        assert installed.read_text() == (SOURCE / name).read_text()

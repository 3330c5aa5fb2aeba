"""UPCAST=1 changes no program's meaning: ordinary programs as they are and with it agree to float32's digits."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.programs import checkpoints, runner

pytest.importorskip("transformers")
pytest.importorskip("litgpt")

ROOT = Path(__file__).parents[2]
# the programs of these files share a process, which imports their libraries once
PROCESSES = [["training", "files", "surgery", "inference"], ["lit"]]
SLOW = {"files.two_processes"}  # starts another, which imports the libraries anew
PROGRAMS = [[name for file in files for name in runner.names(file) if name not in SLOW] for files in PROCESSES]

# What cannot be the same: the error that the program stops with.
ERRORS = {
    # nothing had said that the model learns, so that nothing was recorded
    "training.gradients_without_a_step": "the gradient of a weight stored in float16 was not computed",
    "training.gradients_of_one_weight": "torch.autograd.grad with respect to a weight stored in float16",
}
# float16's rounding is part of what these do: of a merge or a mean into a stored weight, of what is loaded into one, of
# a layer that is initialised at random, of a cache.
ROUNDED = {"training.lora_merged", "training.lora_and_a_saved_head", "training.checkpointed_and_resumed"}
ROUNDED |= {"training.mean_of_weights_while_training", "training.averaged_model", "surgery.an_encoder_decoder_of_two"}
ROUNDED |= {"inference.generation_with_scores", "inference.a_cache_of_ones_own"}
# Programs that load nothing through a loader of ours.
UNPATCHED = {"lit.pretraining_with_fabric"}

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    return checkpoints.write_lit(checkpoints.write_transformers(folder))


@pytest.fixture(scope="module")
def results(python_in: Run, folder: Path) -> dict[bool, Results]:
    return {on: _run_all(python_in, folder, PROGRAMS, on) for on in (False, True)}


@pytest.fixture(scope="module")
def slow_results(python_in: Run, folder: Path) -> dict[bool, Results]:
    return {on: _run_all(python_in, folder, [[*SLOW]], on) for on in (False, True)}


def _run_all(python_in: Run, folder: Path, processes: list[list[str]], on: bool) -> Results:
    found: Results = {}
    for number, programs in enumerate(processes):
        path, waiting = folder / f"{programs[0]}-{number}-{on}.jsonl", programs
        while waiting:
            died = _run(python_in, folder, path, waiting, on)
            found.update({name: result for name, result in map(json.loads, path.read_text().splitlines()) if result})
            waiting = [name for name in programs if name not in found]
            if waiting:  # the process died in the first of them
                found[waiting.pop(0)] = {"error": died, "found": None, "loaded": [], "said": []}
    return found


def _run(python_in: Run, folder: Path, results: Path, programs: list[str], on: bool) -> str:
    """Run ``programs`` in a process, which may die; return how it ended."""
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "UPCAST": str(int(on))}
    done = python_in(ROOT, "-m", "tests.programs.runner", folder, results, *programs, **variables)
    return f"the process ended with {done.returncode}: {done.stderr[-1000:]}"


@pytest.mark.parametrize("program", [name for programs in PROGRAMS for name in programs])
def test_a_program_finds_the_same(results: dict[bool, Results], program: str) -> None:
    _compare(results, program)


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted(SLOW))
def test_a_slow_program_finds_the_same(slow_results: dict[bool, Results], program: str) -> None:
    _compare(slow_results, program)


def _compare(results: dict[bool, Results], program: str) -> None:
    plain, patched = results[False][program], results[True][program]
    assert plain["error"] is None
    assert not any(plain["loaded"])
    if program in ERRORS:
        assert ERRORS[program] in str(patched["error"])
        return
    assert patched["error"] is None
    assert differences(patched["found"], plain["found"], 2e-3 if program in ROUNDED else 1e-4) == []
    assert was_patched(patched) is (program not in UNPATCHED)


def was_patched(result: dict[str, Any]) -> bool:
    """Whether all that a program loaded was stored in float16: otherwise the comparison says nothing."""
    told = any(line.startswith("upcast: GPT") for line in result["said"])
    return told or (bool(result["loaded"]) and all(result["loaded"]))


def differences(got: Any, want: Any, bound: float, where: str = "") -> list[str]:
    """Return where ``got`` is not ``want``; floating-point numbers may differ by ``bound`` of their norm."""
    if type(got) is not type(want):
        return [f"{where}: {got!r} instead of {want!r}"]
    if isinstance(want, dict) and want.keys() == got.keys():
        return [line for key in want for line in differences(got[key], want[key], bound, f"{where}.{key}")]
    if isinstance(want, list) and len(want) == len(got):
        if want and all(isinstance(each, float) for each in want):
            return _numbers(got, want, bound, where)
        return [line for i in range(len(want)) for line in differences(got[i], want[i], bound, f"{where}[{i}]")]
    if isinstance(want, float):
        return _numbers([got], [want], bound, where)
    return [] if got == want else [f"{where}: {got!r} instead of {want!r}"]


def _numbers(got: list[float], want: list[float], bound: float, where: str) -> list[str]:
    error = math.dist(got, want) / max(math.hypot(*want), 1e-30)
    return [] if error < bound else [f"{where}: differs by {error:.1e}: {got[:4]} instead of {want[:4]}"]

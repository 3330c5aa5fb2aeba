"""What the tests share: tiny models, the prepared real model, and comparison against float32."""

import copy
import functools
import gc
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import upcast
from tests import warm
from upcast import kernels
from upcast.tensor.half_weight import HalfWeight

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 where other programs are busy


def pytest_collection_finish() -> None:
    """What the libraries made while they were imported is nobody's garbage: a collection need not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for variable in [name for name in os.environ if name.startswith("UPCAST") and name != "UPCAST_CACHE"]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("COLUMNS", raising=False)  # which some library sets: into a pipe a row is a line
    monkeypatch.setenv("UPCAST_TUNING", "off")  # what was measured of this machine is none of a test's business


@pytest.fixture(autouse=True, scope="module")
def _nothing_compiled() -> None:
    """A graph break marks code of torch's own, such as Module's call, for the rest of the process."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said, and no optimizer is searched for: that takes a tenth of a second."""
    monkeypatch.setenv("UPCAST_VERBOSE", "0")
    monkeypatch.setattr("upcast.patching.discovery._check_optimizers", lambda *_: None)


@pytest.fixture
def inference_on_one_thread() -> Iterator[None]:
    """Without gradients, and on one thread: tests of tiny models would mostly wait for the other one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_other_gpt() -> Iterator[None]:
    """LitGPT's functions are its own at first: models of other tests may be alive, never unpatched."""
    generation = importlib.import_module("upcast.integrations.litgpt.generation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_patched", weakref.WeakSet())
        generation._settle()
        yield
    generation._settle()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct with its real weights, prepared once for all tests."""
    from benchmarks.models.smollm2 import prepare

    return prepare()


def rounded(model: nn.Module) -> nn.Module:
    """Return a float32 copy of ``model`` whose weights are rounded to float16: what a patched model must equal."""
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(parameter.half().float())
    return model


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``want``."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def half_weights(model: nn.Module) -> dict[str, HalfWeight]:
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, HalfWeight)}


def address(tensor: torch.Tensor) -> int:
    """Return where the numbers lie; asked of a HalfWeight itself, that would make it float32."""
    return (tensor.stored if isinstance(tensor, HalfWeight) else tensor).data_ptr()


def assert_patched(model: nn.Module) -> None:
    """Every weight is stored in float16 and nothing else: no test may pass on an untouched model."""
    found = half_weights(model)
    assert found
    assert all(weight.stored.dtype == torch.float16 for weight in found.values())
    assert all(p.dim() < 2 for p in model.parameters() if not isinstance(p, HalfWeight))


def fallbacks(model: nn.Module) -> upcast.tensor.store.Fallbacks:
    return upcast.patching.engine.record_of(upcast.patching.discovery.unwrap(model)).fallbacks


@pytest.fixture(params=["native", "portable"])
def each_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test once with each implementation that is there; test_choice.py says when native must be."""
    if request.param == "native" and not kernels.native.available():
        pytest.skip(kernels.native.load_error())
    monkeypatch.setattr("upcast.kernels._active", None)
    kernels.use(request.param)
    return str(request.param)


Run = Callable[..., subprocess.CompletedProcess[str]]
LONGEST = 500  # seconds of a process


def environment(**variables: str) -> dict[str, str]:
    """Return this process's environment with exactly the given UPCAST variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    return {**clean, "UPCAST_TUNING": "off", **variables}


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Run a Python process in an empty folder, with exactly the given UPCAST variables."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return _new_process(tmp_path, *arguments, **variables)

    return run


def _new_process(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**variables),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )


@pytest.fixture(scope="session")
def warm_process() -> Iterator[warm.Warm]:
    process = warm.Warm()
    yield process
    process.end()


@pytest.fixture(scope="session")
def python_in(warm_process: warm.Warm) -> Run:
    """As `python`, in the folder given first; LitGPT and Transformers are there from the start (see warm.py)."""

    def run(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        if not warm_process.ready():
            return _new_process(folder, *words, **variables)
        return warm_process.run(words, [environment(**variables)], folder, LONGEST)[0]

    return run


@pytest.fixture
def python_with_libraries(python_in: Run, tmp_path: Path) -> Run:
    """As `python`, where LitGPT and Transformers are there from the start."""
    return functools.partial(python_in, tmp_path)

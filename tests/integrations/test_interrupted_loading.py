"""An interrupted load or run leaves nothing behind that the next one would stumble over."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests import interruptions
from tests.conftest import half_weights
from tests.integrations.litgpt.test_prefix import llm_of, say
from tests.interruptions import KINDS, picture, surroundings
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.patching.test_interruptions import llama
from upcast.integrations import stepping_aside
from upcast.patching.parts import RECORD

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("few_lines")
IDS = torch.arange(9).view(1, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupted")
    torch.manual_seed(0)
    llama().half().save_pretrained(path / "llama")
    write_checkpoint(path / "litgpt", small_config("pythia-14m", n_layer=1))
    return path


def llm_load(folder: Path) -> Any:
    from litgpt import LLM

    return LLM.load(str(folder / "litgpt")).model


LOADS: dict[str, Callable[[Path], Any]] = {
    "load_litgpt": lambda folder: upcast.load_litgpt(folder / "litgpt"),
    "from_pretrained": lambda folder: upcast.from_pretrained(transformers.LlamaForCausalLM, folder / "llama"),
    "Transformers": lambda folder: transformers.LlamaForCausalLM.from_pretrained(folder / "llama"),
    "LLM.load": llm_load,
}


def _check_loads(load: Callable[[], Any], lines: range) -> None:
    want, outside = picture(load()), surroundings()
    for at in lines:
        interruptions.run(load, at, KINDS[at % 3])
        assert surroundings() == outside, at
        model = load()
        assert half_weights(model), at
    same = picture(model) == want  # pytest would take minutes to show how they differ
    assert same


@pytest.fixture
def _activated(monkeypatch: pytest.MonkeyPatch) -> None:
    import litgpt.api

    from upcast.integrations.litgpt import load as litgpt_integration
    from upcast.integrations.transformers import load as integration

    monkeypatch.setenv("UPCAST", "1")
    integration.install()
    litgpt_integration.activate(litgpt.api)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.usefixtures("_activated")
def test_an_interrupted_load_leaves_nothing_behind(folder: Path, name: str) -> None:
    lines = interruptions.run(lambda: LOADS[name](folder))
    _check_loads(lambda: LOADS[name](folder), range(1 + len(name), lines + 1, lines // 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADS)
@pytest.mark.usefixtures("_activated")
def test_a_load_interrupted_at_many_lines(folder: Path, name: str) -> None:
    lines = interruptions.run(lambda: LOADS[name](folder))
    _check_loads(lambda: LOADS[name](folder), range(1, lines + 1, max(1, lines // 900)))


def test_what_was_wrapped_before_an_interruption_is_not_wrapped_again() -> None:
    def wrapper(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
        calls.append(wrapped.__name__)
        return wrapped(*args, **kwargs)

    names, calls = ("one", "two", "three"), list[str]()
    wrappers: dict[str, Any] = dict.fromkeys(names, wrapper)

    def library() -> ModuleType:
        module = ModuleType("library")
        vars(module).update({name: eval(f"lambda: {name!r}") for name in names})
        return module

    for at in range(1, interruptions.run(lambda: stepping_aside.wrap(library(), wrappers)) + 1):
        module = library()
        interruptions.run(lambda: stepping_aside.wrap(module, wrappers), at)  # noqa: B023
        stepping_aside.wrap(module, wrappers)
        calls.clear()
        assert [getattr(module, name)() for name in names] == [*names]
        assert len(calls) == 3, at


# --- generation -------------------------------------------------------------------------------------------------------


def gpt_generates(folder: Path) -> SimpleNamespace:
    gpt = upcast.load_litgpt(folder / "litgpt")
    llm = llm_of(gpt)
    return SimpleNamespace(model=gpt, run=lambda: say(llm, [5, 6, 7]))


def llama_generates(folder: Path) -> SimpleNamespace:
    model = upcast.from_pretrained(transformers.LlamaForCausalLM, folder / "llama")
    options = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0, "do_sample": False, "max_new_tokens": 3}
    return SimpleNamespace(model=model, run=lambda: model.generate(IDS, **options))


def runs_under_a_policy(folder: Path) -> SimpleNamespace:
    model = upcast.load_litgpt(folder / "litgpt", policy="norm+residual+linear", heal=True)
    return SimpleNamespace(model=model, run=lambda: _logits(model))


def runs_watched(folder: Path) -> SimpleNamespace:
    model = upcast.load_litgpt(folder / "litgpt", guard=True)
    return SimpleNamespace(model=model, run=lambda: _logits(model))


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        output = model(IDS)
    return getattr(output, "logits", output)


RUNS = {f.__name__: f for f in (gpt_generates, llama_generates, runs_under_a_policy, runs_watched)}


def _check_runs(made: SimpleNamespace, points: int, first: int) -> None:
    want, logits, outside = torch.as_tensor(made.run()), _logits(made.model), surroundings()
    lines = interruptions.run(made.run)
    for at in range(first, lines + 1, max(1, lines // points)):
        interruptions.run(made.run, at, KINDS[at % 3])
        left = surroundings()
        assert torch.equal(_logits(made.model), logits), at  # of all positions
        now = (
            surroundings()
        )  # torch itself puts a mode back as an interrupted call is cleared away; the next call ends it
        assert {**left, "function modes": now["function modes"]} == now == outside, at
        assert torch.equal(torch.as_tensor(made.run()), want), at
        assert RECORD in vars(made.model)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_leaves_nothing_behind(folder: Path, name: str) -> None:
    _check_runs(RUNS[name](folder), 12, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_at_every_line(folder: Path, name: str) -> None:
    _check_runs(RUNS[name](folder), 10**9, 1)

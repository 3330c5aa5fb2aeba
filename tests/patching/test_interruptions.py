"""An interruption at any line of upcast leaves the model as it was or as it will be, and nothing else behind."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests import interruptions
from tests.conftest import assert_patched, half_weights
from tests.interruptions import KINDS, identities, picture, surroundings
from tests.litgpt_checkpoints import small_config

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("few_lines")


def equal_halves() -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Embedding(9, 9)).half()
    with torch.no_grad():
        for layer in model[1:]:
            layer.weight.copy_(model[0].weight)
    return model


def of_every_dtype() -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 7).double(), nn.Linear(7, 9).bfloat16(), nn.Linear(9, 9).half(), nn.GRU(9, 3))
    model[1].weight.flavour = "sweet"
    model[2].register_forward_hook(lambda *_: None)
    return model


def with_a_frozen_base() -> nn.Module:
    model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 3))
    model[0].requires_grad_(False)
    return model


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, vocab_size=65, num_hidden_layers=1, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


def tied_gpt() -> nn.Module:
    from litgpt import GPT

    model = GPT(small_config("pythia-14m", n_layer=1))
    model.lm_head.weight = model.transformer.wte.weight
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(33, 17), {}),
    "lstm": (lambda: nn.Sequential(nn.LSTM(9, 7, 2, bidirectional=True)), {}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ConvTranspose1d(5, 3, 3)), {}),
    "equal halves": (equal_halves, {}),
    "every dtype": (of_every_dtype, {}),
    "frozen base": (with_a_frozen_base, {}),
    "policy": (lambda: nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)), {"policy": "norm", "heal": True}),
    "guard": (lambda: nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)), {"guard": True}),
    "llama": (llama, {}),
    "tied gpt": (tied_gpt, {}),
}


class Case:
    """One model, and what it looks like unpatched, patched, and unpatched again."""

    def __init__(self, name: str) -> None:
        self.make, self.options = MODELS[name]
        model = self.fresh()
        self.plain = picture(model)
        upcast.patch(model, **self.options)
        assert half_weights(model)
        self.patched = picture(model)
        self.unpatched = picture(upcast.unpatch(model))

    def fresh(self, patched: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        return upcast.patch(model, **self.options) if patched else model

    def act(self, action: str, model: nn.Module) -> None:
        if action == "patch":
            upcast.patch(model, **self.options)
        elif action == "unpatch":
            upcast.unpatch(model)
        else:
            policy = self.options.get("policy", "safe")
            with upcast.patched(model, policy=policy):
                pass

    def check(self, action: str, at: int, kind: str, again: int = 0) -> None:
        outside, model = surroundings(), self.fresh(patched=action == "unpatch")
        before, first = identities(model), picture(model)
        interruptions.run(functools.partial(self.act, action, model), at, kind, again)
        where, now = f"{action}, {kind} at line {at}", picture(model)
        if now == first:
            assert identities(model) == before, where
        elif not again:
            whole = {"patch": self.patched, "unpatch": self.unpatched, "patched": self.plain}[action]
            assert _same(now, whole), where
        self.check_goes_on(model, where)
        del model
        assert surroundings() == outside, where

    def check_goes_on(self, model: nn.Module, where: str) -> None:
        assert _error(upcast.unpatch, model).partition(";")[0][-20:] in ("", "not patched by upcast"[-20:]), where
        assert any(_same(picture(model), whole) for whole in (self.plain, self.unpatched)), where
        upcast.patch(model, **self.options)
        assert half_weights(model), where
        upcast.unpatch(model)

    def lines(self, action: str) -> int:
        model = self.fresh(patched=action == "unpatch")
        count = interruptions.run(functools.partial(self.act, action, model))
        _error(upcast.unpatch, model)  # or LitGPT's functions stay wrapped
        return count


ACTIONS = ("patch", "unpatch", "patched")


@pytest.mark.parametrize("name", MODELS)
def test_interrupted_at_some_lines(name: str) -> None:
    """Of each action at lines from its beginning to its end, and more in its second half, where the model changes."""
    case = Case(name)
    for i, action in enumerate(ACTIONS):
        lines = case.lines(action)
        for at in (*range(1 + i, lines // 2, lines // 4), *range(lines // 2 + len(name), lines + 1, lines // 12)):
            case.check(action, at, KINDS[at % 3])


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_interrupted_at_every_line(name: str, action: str) -> None:
    case = Case(name)
    for at in range(1, case.lines(action) + 1):
        case.check(action, at, KINDS[at % 3])
        if name in ("linear", "every dtype", "policy"):
            case.check(action, at, "raised")


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["every dtype", "policy"])
def test_interrupted_again_on_the_way_back(name: str, action: str) -> None:
    case = Case(name)
    lines = case.lines(action)
    for at in range(lines // 2, lines, lines // 8):
        for again in (3, 17, 40):
            case.check(action, at, "signal", again)


def test_what_was_cut_short_twice_is_taken_back_when_it_is_next_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("every dtype")
    for look in (upcast.plan, upcast.patch, upcast.unpatch, upcast.report):
        model = case.fresh()
        before = identities(model)
        with monkeypatch.context() as twice:
            twice.setattr("upcast.patching.hooks.install", _interrupted)
            twice.setattr("upcast.patching.hooks.remove", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                upcast.patch(model)
        assert half_weights(model)
        assert bool(_error(look, model)) == (look is upcast.report)  # it is not patched
        if look is upcast.patch:
            assert _same(picture(upcast.unpatch(model)), case.unpatched)
        else:
            assert _same(picture(model), case.plain)
            assert identities(model) == before


def test_another_thread_does_not_take_back_what_this_one_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, errors = nn.Linear(9, 9), []
    original = upcast.patching.hooks.install

    def meanwhile(*args: Any, **kwargs: Any) -> None:
        for other in (upcast.unpatch, upcast.patch, upcast.report):
            thread = threading.Thread(target=lambda other=other: errors.append(_error(other, model)))
            thread.start()
            thread.join()
        original(*args, **kwargs)

    monkeypatch.setattr("upcast.patching.hooks.install", meanwhile)
    upcast.patch(model)
    assert [error.partition(";")[0].partition(",")[0] for error in errors] == [
        "another thread is patching this Linear"
    ] * 3
    assert_patched(model)
    upcast.unpatch(model)


def _same(one: Any, other: Any) -> bool:
    """Whether two pictures are equal; pytest would take minutes to show how they differ."""
    return bool(one == other)


def _error(function: Callable[[Any], Any], model: nn.Module) -> str:
    try:
        function(model)
    except upcast.UpcastError as error:
        return str(error)
    return ""


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


# --- pieces and conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_unpatch_of_a_piece_is_done_to_its_end(kind: str) -> None:
    case = Case("every dtype")
    model = case.fresh(patched=True)
    lines = interruptions.run(lambda: upcast.unpatch(model[:3]))
    begun = 0
    for at in range(1 + KINDS.index(kind), lines + 1, lines // 40):
        outside, model = surroundings(), case.fresh(patched=True)
        piece = model[:3]
        first = picture(piece)
        interruptions.run(lambda: upcast.unpatch(piece), at, kind)  # noqa: B023
        if picture(piece) != first:
            begun += 1
            dtypes = [layer.weight.dtype for layer in piece]
            assert dtypes == [torch.float64, torch.bfloat16, torch.float16], (at, dtypes)
            assert [type(layer.weight) for layer in piece] == 3 * [nn.Parameter]
            assert piece[1].weight.flavour == "sweet"
        assert surroundings() == outside, at
        upcast.unpatch(model)
        assert not half_weights(model)
    assert begun > 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_conversion_loses_no_weight(kind: str) -> None:
    case = Case("frozen base")
    lines = interruptions.run(case.fresh(patched=True).float)
    for at in range(1 + KINDS.index(kind), lines + 1, 7):
        model = case.fresh(patched=True)
        before = identities(model)
        interruptions.run(model.float, at, kind)
        assert identities(model) == before, at


def test_a_piece_of_which_torch_holds_a_weight_stays_whole() -> None:
    model = upcast.patch(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)))
    piece = model[:2]
    first = picture(piece)
    with torch._C.DisableTorchFunctionSubclass():
        view = piece[1].weight.view(81)  # as C++ code may, past HalfWeight's own views
    with pytest.raises(upcast.UpcastError, match="something inside torch holds it"):
        upcast.unpatch(piece)
    assert _same(picture(piece), first)
    del view
    upcast.unpatch(piece)
    assert not half_weights(piece)

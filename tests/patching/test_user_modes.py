"""User code around a patched model: its own caches, masks and modes, and replaced functions of torch."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import upcast
from tests.conftest import assert_patched, relative_error, rounded
from tests.patching.test_user_code import IDS, PROMPT, Pair, _mine, _replace, cache_utils, lm

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")

# --- caches, masks and modes of the program's own ---------------------------------------------------------------------


class Sinks(cache_utils.DynamicCache):
    """Keeps the first two rows and the last three, as a program with a cache of its own does."""

    def update(self, *args: Any) -> Any:
        return _sinks(self, *args)


def _sinks(cache: Any, *args: Any) -> Any:
    keys, values = cache_utils.DynamicCache.update(cache, *args)
    if keys.shape[2] <= PROMPT:
        return keys, values
    return tuple(torch.cat([each[:, :, :1] * 3, each[:, :, -3:]], 2) for each in (keys, values))


@pytest.mark.parametrize("own", [True, False], ids=["a class", "one object"])
def test_a_cache_of_the_program_s_own_is_asked(own: bool) -> None:
    pair = Pair("Llama")
    found = []
    for model in (pair.model, pair.plain):
        cache: Any = Sinks(config=model.config) if own else cache_utils.DynamicCache(config=model.config)
        if not own:
            cache.update = functools.partial(_sinks, cache)
        model(IDS[:, :PROMPT], past_key_values=cache)
        found.append(model(IDS[:, PROMPT : PROMPT + 1], past_key_values=cache).logits)
    assert relative_error(*found) < 3e-3
    assert relative_error(found[1], pair.usual[1]) > 3e-2


def _window_of_two(max_seq_length: int, device: Any = None) -> Tensor:
    ones = torch.ones(max_seq_length, max_seq_length, dtype=torch.bool)
    return (ones.tril() & ones.triu(-1))[None, None]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_mask_of_the_program_s_own_counts(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("SmolLM2", unpatched=when == "before")
    with monkeypatch.context() as patch:
        patch.setattr(lm, "build_mask_cache", _window_of_two)
        for model in (pair.model, pair.plain):
            model.clear_kv_cache()
        if when == "before":
            pair.patch()
        pair.same_but_unusual()


class MyKVCache(lm.KVCache):
    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super().forward(input_pos, k * 1.5, v)
        return k, v * 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_class_of_the_program_s_own_is_used(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("SmolLM2", unpatched=when == "before")
    monkeypatch.setattr(lm, "KVCache", MyKVCache)
    if when == "before":
        pair.patch()
    pair.same_but_unusual()


class Mode(TorchFunctionMode):
    """Sees each function, and changes what one of them gives."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function, self.seen = function, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not self.function:
            return output
        self.seen += 1
        return output * 1.3


MODES = [
    *(("SmolLM2", function) for function in (F.linear, F.silu, torch.rsqrt, F.scaled_dot_product_attention)),
    *(("Pythia", function) for function in (F.linear, F.layer_norm, F.gelu)),
    *(("Llama", function) for function in (F.linear, F.silu, torch.rsqrt, F.scaled_dot_product_attention)),
    ("GPT-2", F.linear),
]


@pytest.mark.parametrize(("family", "function"), MODES, ids=lambda value: getattr(value, "__name__", value))
def test_a_mode_sees_what_it_would_see(family: str, function: Any) -> None:
    pair = Pair(family)
    assert pair.fast() or family == "GPT-2"
    with Mode(function) as ours:
        got = pair.run(pair.model)
    with Mode(function) as theirs:
        want = pair.run(pair.plain)
    assert pair.error(got, want) < pair.limit
    assert pair.error(want, pair.usual) > 10 * pair.limit
    assert ours.seen == theirs.seen > 0
    assert pair.fast() or family == "GPT-2"


class Dispatch(TorchDispatchMode):
    """Sees each operation, and changes what one of them gives."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation, self.seen = operation, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not self.operation:
            return output
        self.seen += 1
        return output * 1.3


@pytest.mark.parametrize("operation", ["silu", "rsqrt"])
@pytest.mark.parametrize("family", ["SmolLM2", "Llama"])
def test_a_mode_sees_the_operations_that_it_would_see(family: str, operation: str) -> None:
    pair, found = Pair(family), []
    for model in (pair.model, pair.plain):
        with Dispatch(getattr(torch.ops.aten, operation).default) as mode:
            found.append((pair.run(model), mode.seen))
    (got, ours), (want, theirs) = found
    assert pair.error(got, want) < pair.limit
    assert ours == theirs > 0


def test_a_mode_that_says_where_tensors_are_made_changes_nothing() -> None:
    pair = Pair("SmolLM2")
    with torch.device("cpu"):
        assert pair.fast()


# --- functions of torch, without a library's modules ------------------------------------------------------------------

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(10).view(2, 5)
LAYERS: list[tuple[str, Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], list[tuple[Any, str]]]] = [
    (
        "attention",
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (X, X, X),
        {"need_weights": False},
        [(F, "linear"), (F, "scaled_dot_product_attention"), (F, "multi_head_attention_forward")],
    ),
    (
        "weights",
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        (X, X, X),
        {},
        [(F, "softmax"), (torch, "bmm")],
    ),
    ("embedding", lambda: nn.Embedding(10, 16), (TOKENS,), {}, [(F, "embedding"), (nn.Embedding, "forward")]),
    ("bag", lambda: nn.EmbeddingBag(10, 16), (TOKENS,), {}, [(F, "embedding_bag")]),
    ("convolution", lambda: nn.Conv1d(5, 4, 3), (X,), {}, [(F, "conv1d"), (nn.Conv1d, "forward")]),
    ("bilinear", lambda: nn.Bilinear(16, 16, 4), (X, X), {}, [(F, "bilinear")]),
    ("linear", lambda: nn.Linear(16, 4), (X,), {}, [(F, "linear"), (nn.Linear, "forward"), (nn.Module, "__call__")]),
]
ROWS = [pytest.param(*row[1:4], *each, id=f"{row[0]}-{each[1]}") for row in LAYERS for each in row[4]]


@torch.inference_mode(False)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("create", "args", "kwargs", "owner", "name"), ROWS)
def test_what_is_replaced_of_torch_runs(
    create: Any, args: Any, kwargs: dict[str, Any], owner: Any, name: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first(model: nn.Module) -> Tensor:
        output = model(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    model = create()
    plain = rounded(model)  # in training mode, or torch has a fast path of its own for attention
    upcast.patch(model)
    assert_patched(model)
    with torch.set_grad_enabled(grad):
        usual = first(plain)
        _replace(monkeypatch, owner, name, _mine)
        want = first(plain)
        assert relative_error(first(model), want) < 1e-5
    assert relative_error(want, usual) > 1e-3


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_handlers_compute_with_is_torch_s_own(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent layer of torch calls no function that a program could replace."""
    model = kind(16, 32).eval()
    plain = rounded(model)
    upcast.patch(model)
    assert_patched(model)
    monkeypatch.setattr(F, "linear", _mine(F.linear))
    assert relative_error(model(X)[0], plain(X)[0]) < 1e-5


# --- and all of it cheaply, and of copies too -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["SmolLM2", "Llama"])
def test_copies_look_for_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(family)
    for other in (copy.deepcopy(pair.model), pickle.loads(pickle.dumps(pair.model))):
        pair.model = other
        assert pair.fast()
    monkeypatch.setattr(F, "silu", _mine(F.silu))
    pair.same_but_unusual()


def test_what_was_replaced_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from upcast.tensor import genuine

    genuine.originals.cache_clear()
    pair = Pair("SmolLM2")
    monkeypatch.setattr(lm, "apply_rope", _mine(lm.apply_rope))
    capsys.readouterr()
    pair.run(pair.model)
    first = capsys.readouterr().err
    assert "litgpt.model.apply_rope was replaced" in first
    pair.run(pair.model)
    assert not capsys.readouterr().err

"""Whatever a program replaces in a patched model, in its library or in torch counts, in prefill and in decode.

Each row replaces something, in a patched model and in the same float32 model on rounded weights: both give the same,
which is not what they gave before; and before it, and after it is undone, the fused forwards run.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import wrapt
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, relative_error, rounded
from tests.fused_models import calls, make
from tests.integrations.transformers.test_layer import lively
from tests.transformers_models import make as make_transformers
from upcast.patching.fast_linear import LinearForward

lm = pytest.importorskip("litgpt.model")
pytest.importorskip("transformers")
activations = importlib.import_module("transformers.activations")
cache_utils = importlib.import_module("transformers.cache_utils")
modeling_utils = importlib.import_module("transformers.modeling_utils")
gpt2, llama, qwen3 = (
    importlib.import_module(f"transformers.models.{n}.modeling_{n}") for n in ("gpt2", "llama", "qwen3")
)
ALL_ATTENTION_FUNCTIONS, GLOBAL = (
    modeling_utils.ALL_ATTENTION_FUNCTIONS,
    modeling_utils.AttentionInterface._global_mapping,
)

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")

IDS = torch.randint(0, 60, (1, 8), generator=torch.Generator().manual_seed(1))
PROMPT = 6


# --- models, and what they give for a prompt and for the tokens after it ----------------------------------------------


def _litgpt(model: Any) -> list[Tensor]:
    model.set_kv_cache(1, 16)
    return [
        model(IDS[:, start:end], torch.arange(start, end), input_pos_maxp1=end)
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, IDS.shape[1]))]
    ]


def _transformers(model: Any) -> list[Tensor]:
    cache, found = cache_utils.DynamicCache(config=model.config), []
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, IDS.shape[1]))]:
        found.append(model(IDS[:, start:end], past_key_values=cache, use_cache=True).logits)
    return found


def _lively_gpt2() -> Any:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = make_transformers("GPT2LMHeadModel", "GPT2Config", sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.dim() >= 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[Any], list[Tensor]], float]] = {
    "SmolLM2": (lambda: make("SmolLM2-135M-Instruct"), _litgpt, 1e-5),
    "Pythia": (lambda: make("pythia-160m"), _litgpt, 1e-5),
    "Gemma 2": (lambda: make("Gemma-2-2b"), _litgpt, 1e-5),
    "Mixtral": (lambda: make("Mixtral-8x7B-v0.1"), _litgpt, 1e-5),
    "Llama": (lambda: lively("Llama"), _transformers, 3e-3),
    "Qwen3": (lambda: lively("Qwen3"), _transformers, 3e-3),
    "GPT-2": (_lively_gpt2, _transformers, 3e-3),
}


class Pair:
    """A patched model and the float32 model on the same rounded weights."""

    def __init__(self, family: str, unpatched: bool = False) -> None:
        create, self.run, self.limit = FAMILIES[family]
        model = create()
        self.plain = rounded(model)
        self.usual = self.run(self.plain)
        self.model = model
        if not unpatched:
            self.patch()

    def patch(self) -> None:
        kv_cache = "float32" if self.run is _litgpt else "float16"
        upcast.patch(self.model, kv_cache=kv_cache)
        assert_patched(self.model)

    def both(self, change: Callable[[Any], Any]) -> None:
        for each in (self.model, self.plain):
            change(each)

    def fast(self) -> int:
        """Return how many fused forwards run in a run that gives what it always gave."""
        before = calls(self.model)
        got = self.run(self.model)
        assert self.error(got, self.usual) < self.limit
        return calls(self.model) - before

    def same_but_unusual(self) -> None:
        """The patched model gives what the other one gives, and neither prompt nor tokens are as they were."""
        got, want = self.run(self.model), self.run(self.plain)
        assert self.error(got, want) < self.limit
        for new, old in zip(want, self.usual, strict=True):
            assert relative_error(new, old) > 10 * self.limit

    @staticmethod
    def error(got: list[Tensor], want: list[Tensor]) -> float:
        return max(relative_error(a, b) for a, b in zip(got, want, strict=True))


# --- replaced for everyone: (family, owner, name) ---------------------------------------------------------------------

EVERYWHERE = [(nn.Linear, "forward"), (F, "linear"), (nn.Module, "__call__")]
LITGPT = [
    *((kind, "forward") for kind in (lm.CausalSelfAttention, lm.Block, lm.GPT, lm.KVCache, nn.Embedding)),
    *((lm, name) for name in ("apply_rope", "batched_index_copy_")),
    *((lm.CausalSelfAttention, "scaled_dot_product_attention"), (F, "scaled_dot_product_attention"), (F, "embedding")),
    *EVERYWHERE,
]
CACHES = [(kind, "update") for kind in (cache_utils.DynamicLayer, cache_utils.Cache)]
TRANSFORMERS = [(F, "scaled_dot_product_attention"), *CACHES]
REPLACED: list[tuple[str, Any, str]] = [
    *(("SmolLM2", *each) for each in LITGPT),
    *(
        ("SmolLM2", *each)
        for each in [(lm.RMSNorm, "forward"), (lm.LLaMAMLP, "forward"), (F, "silu"), (torch, "rsqrt")]
    ),
    *(("Pythia", *each) for each in LITGPT if each[0] in (F, lm, lm.Block)),
    *(("Pythia", *each) for each in [(lm.GptNeoxMLP, "forward"), (F, "gelu"), (nn.LayerNorm, "forward")]),
    *(("Pythia", *each) for each in [(F, "layer_norm"), (torch, "layer_norm")]),
    *(("Gemma 2", *each) for each in [(lm, "do_softcapping"), (lm.GemmaMLP, "forward"), (F, "softmax")]),
    *(("Mixtral", kind, "forward") for kind in (lm.LLaMAMoE, lm.LLaMAMLP)),
    *(("Llama", *each) for each in (*EVERYWHERE, *TRANSFORMERS)),
    *(("Llama", llama, name) for name in ("apply_rotary_pos_emb", "rotate_half")),
    *(("Llama", getattr(llama, f"Llama{kind}"), "forward") for kind in ("RMSNorm", "MLP", "Attention", "DecoderLayer")),
    *(("Llama", *each) for each in [(activations.SiLUActivation, "forward"), (F, "silu"), (torch, "rsqrt")]),
    *(("Llama", *each) for each in [(F, "embedding"), (nn.Embedding, "forward")]),
    *(("Llama", kind, "__call__") for kind in (llama.LlamaMLP, llama.LlamaDecoderLayer, activations.SiLUActivation)),
    ("Llama", Tensor, "pow"),
    *(("SmolLM2", *each) for each in [(lm.Block, "__call__"), (lm.LLaMAMLP, "__call__"), (Tensor, "float")]),
    *(("Llama", ALL_ATTENTION_FUNCTIONS, "sdpa"), ("Llama", GLOBAL, "sdpa")),
    *(("Qwen3", qwen3, name) for name in ("apply_rotary_pos_emb", "rotate_half")),
    *(("Qwen3", getattr(qwen3, f"Qwen3{kind}"), "forward") for kind in ("RMSNorm", "MLP", "Attention")),
    *(("GPT-2", *each) for each in (*EVERYWHERE, *CACHES, (nn.LayerNorm, "forward"))),
    *(("GPT-2", *each) for each in [(gpt2.GPT2MLP, "forward"), (gpt2.Conv1D, "forward")]),
]


def _changed(output: Any) -> Any:
    """Return an output that is not what it was, in its first float tensor of more than one dimension."""
    if isinstance(output, tuple):
        return (_changed(output[0]), *output[1:])
    if isinstance(output, Tensor) and output.is_floating_point():
        return output * torch.linspace(0.3, 1.7, output.shape[-1]) + output.abs().mean() * 0.7
    return output


def _mine(original: Callable[..., Any]) -> Callable[..., Any]:
    def mine(*args: Any, **kwargs: Any) -> Any:
        return _changed(original(*args, **kwargs))

    return mine


def _wraps(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(original)(_mine(original))


def _partialmethod(original: Callable[..., Any]) -> Any:
    def mine(self: Any, how: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
        return how(original(self, *args, **kwargs))

    return functools.partialmethod(mine, _changed)


def _wrapt(original: Callable[..., Any]) -> Any:
    return wrapt.FunctionWrapper(original, lambda wrapped, _, args, kwargs: _changed(wrapped(*args, **kwargs)))


def _replace(patch: pytest.MonkeyPatch, owner: Any, name: str, how: Callable[[Any], Any]) -> None:
    if owner is ALL_ATTENTION_FUNCTIONS:
        patch.setitem(owner._local_mapping, name, how(owner[name]))
    elif owner is GLOBAL:
        patch.setitem(owner, name, how(owner[name]))
    else:
        patch.setattr(owner, name, how(getattr(owner, name)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "owner", "name"), REPLACED)
def test_what_is_replaced_for_everyone_runs(
    family: str, owner: Any, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(family, unpatched=when == "before")
    if when == "after":
        assert pair.fast() or family == "GPT-2"
    with monkeypatch.context() as patch:
        _replace(patch, owner, name, _mine)
        if when == "before":
            pair.patch()
        pair.same_but_unusual()
    assert pair.fast() or family == "GPT-2" or when == "before"


FORMS = [_wraps, _partialmethod, _wrapt]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize(
    ("family", "owner", "name"),
    [
        ("SmolLM2", lm.RMSNorm, "forward"),
        ("SmolLM2", lm.CausalSelfAttention, "forward"),
        ("SmolLM2", nn.Linear, "forward"),
        ("Llama", llama.LlamaRMSNorm, "forward"),
        ("Llama", llama.LlamaMLP, "forward"),
        ("Llama", llama.LlamaAttention, "forward"),
    ],
)
def test_however_it_is_replaced(
    family: str, owner: Any, name: str, how: Any, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(family, unpatched=when == "before")
    _replace(monkeypatch, owner, name, how)
    if when == "before":
        pair.patch()
    pair.same_but_unusual()


@pytest.mark.parametrize("family", ["SmolLM2", "Llama"])
def test_a_mock_of_a_class_is_called_without_the_module(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(family)
    owner = lm.RMSNorm if family == "SmolLM2" else llama.LlamaRMSNorm
    replaced = mock.Mock(side_effect=lambda x: x * 0.5)
    monkeypatch.setattr(owner, "forward", replaced)
    pair.same_but_unusual()
    assert replaced.called


def test_a_replaced_forward_may_take_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upcast.patch(nn.Sequential(nn.Linear(4, 4)).eval())
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x, scale=1.0, *, shift=0.0: F.linear(x, self.weight) * scale + shift
    )
    x = torch.randn(2, 4)
    want = x @ model[0].weight.stored.float().t() * 3.0 + 1.0
    assert isinstance(model[0].__dict__["forward"], LinearForward)
    assert relative_error(model[0](x, 3.0, shift=1.0), want) < 1e-5
    assert relative_error(model[0](x=x, scale=3.0, shift=1.0), want) < 1e-5

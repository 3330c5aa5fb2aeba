"""Prompts that begin alike, and anything done to the model between them: the results are those of a fresh model.

Edits of all that logits depend on are drawn at random: weights through every alias of their memory, buffers, hooks,
forwards, the config, the caches, LoRA switched on and off, LitGPT's own functions.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, relative_error
from tests.fused_models import make, without_fusion
from tests.integrations.litgpt.test_prefix import llm_of, one_thread  # noqa: F401
from upcast.integrations.litgpt.prefix_cache import caches_of

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 3
LIMITS = {"float32": 1e-4, "float16": 2e-2}  # some edits make scores large, and with them what rounding costs
MODELS = ("SmolLM2-135M-Instruct", "pythia-160m", "Gemma-3-4b-it")  # norms, biases, dual angles and windows
TOKENS = [(7 * i + 3) % 300 for i in range(40)]  # a window of Gemma's holds 16

# --- weights, through every alias of their memory ---------------------------------------------------------------------

WEIGHTS = (
    *("transformer.wte.weight", "transformer.h.0.norm_1.weight", "transformer.h.1.norm_2.weight"),
    *("transformer.h.0.attn.qkv.weight", "transformer.h.1.attn.proj.weight", "transformer.h.1.mlp.proj.weight"),
    *("transformer.h.2.norm_1.weight", "transformer.h.2.attn.qkv.weight", "transformer.ln_f.weight", "lm_head.weight"),
)
ALIASES: dict[str, Callable[[nn.Module, str], Tensor]] = {
    "itself": lambda m, name: m.get_parameter(name),
    ".data": lambda m, name: m.get_parameter(name).data,
    "detach": lambda m, name: m.get_parameter(name).detach(),
    "a row": lambda m, name: m.get_parameter(name).data[1:2],
    "an end": lambda m, name: m.get_parameter(name).data[-1:],
    "state_dict": lambda m, name: m.state_dict()[name],
    "state_dict, numpy": lambda m, name: torch.from_numpy(m.state_dict()[name].numpy()),
    "state_dict, dlpack": lambda m, name: torch.from_dlpack(m.state_dict()[name].detach()),
    "a buffer's memory": lambda m, name: torch.frombuffer(
        memoryview(m.state_dict()[name].view(torch.uint8).numpy()), dtype=m.state_dict()[name].dtype
    ).view_as(m.state_dict()[name]),
    "numpy": lambda m, name: torch.from_numpy(m.get_parameter(name).detach().numpy()),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda t: t.mul_(1.5),
    "flipped": lambda t: t.copy_(t.flip(-1).clone()),
    "copy_": lambda t: t.copy_(torch.rand(t.shape) * 0.2),
    "init": lambda t: nn.init.normal_(t, std=0.1),
    "one number": lambda t: t[..., :1].add_(0.5),
    "there and back": lambda t: (t.mul_(2), t.mul_(0.5)),
}

# --- everything else --------------------------------------------------------------------------------------------------


def _block(gpt: Any) -> Any:
    return gpt.transformer.h[1]


def _call(gpt: Any, tokens: list[int], start: int) -> None:
    if len(gpt.transformer.h) == len(caches_of(gpt)):
        gpt(torch.tensor([tokens]), torch.arange(start, start + len(tokens)))


def _scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


class LoRA(nn.Module):
    """A layer with something added, as PEFT's are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.a = base, nn.Parameter(torch.full((base.out_features, base.in_features), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + nn.functional.linear(x, self.a)  # type: ignore[no-any-return]


def _lora(gpt: Any) -> None:
    """Switch it on, or off again."""
    attn = _block(gpt).attn
    attn.qkv = attn.qkv.base_layer if isinstance(attn.qkv, LoRA) else LoRA(attn.qkv)


def _replaced(gpt: Any) -> None:
    """Replace a forward, or give it back."""
    norm = _block(gpt).norm_1
    before = norm.__dict__.pop("forward", None)
    if before is None or not hasattr(before, "before"):
        norm.forward = lambda x: type(norm).forward(norm, x) * 0.5
        norm.forward.before = before
    elif before.before is not None:
        norm.forward = before.before


def _rope_indices(gpt: Any) -> None:
    if gpt.config.rope_indices is not None:
        gpt.config.rope_indices[0] = 1 - gpt.config.rope_indices[0]


EDITS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda gpt: None,
    "angles written": lambda gpt: gpt.cos.data.mul_(0.5),
    "angles replaced": lambda gpt: setattr(gpt, "sin", gpt.sin * 0.5),
    "angles flipped": lambda gpt: setattr(gpt, "cos", gpt.cos.flip(0)),
    "a hook on the embedding": lambda gpt: gpt.transformer.wte.register_forward_hook(_scaled),
    "a hook on a norm": lambda gpt: _block(gpt).norm_1.register_forward_hook(_scaled),
    "a hook on the head": lambda gpt: gpt.lm_head.register_forward_hook(_scaled),
    "a hook on the model": lambda gpt: gpt.register_forward_pre_hook(lambda m, args: ((args[0] + 1) % 300, *args[1:])),
    "no hooks": lambda gpt: [m._forward_hooks.clear() or m._forward_pre_hooks.clear() for m in gpt.modules()],
    "a forward": _replaced,
    "LoRA": _lora,
    "eps": lambda gpt: setattr(_block(gpt).norm_1, "eps", 0.3),
    "the factor of the scores": lambda gpt: setattr(gpt.config, "attention_scores_scalar", 3),
    "which angles": _rope_indices,
    "the embedding's factor": lambda gpt: setattr(gpt.config, "scale_embeddings", not gpt.config.scale_embeddings),
    "another embedding": lambda gpt: setattr(
        gpt.transformer, "wte", nn.Embedding(gpt.transformer.wte.num_embeddings, gpt.config.n_embd)
    ),
    "keys zeroed": lambda gpt: [cache.k.data.zero_() for cache in caches_of(gpt)[:1]],
    "values swapped": lambda gpt: [cache.v.data.copy_(cache.v.flip(2)) for cache in caches_of(gpt)[1:]],
    "a number of a key": lambda gpt: [cache.k[0, 0, 2, :1].data.add_(1) for cache in caches_of(gpt)[1:2]],
    "keys replaced": lambda gpt: [setattr(cache, "k", cache.k * 0.5) for cache in caches_of(gpt)],
    "caches reset": lambda gpt: [cache.reset_parameters() for cache in caches_of(gpt)],
    "caches made anew": lambda gpt: gpt.set_kv_cache(1, 64),
    "other tokens": lambda gpt: _call(gpt, [5, 6, 8], 0),
    "a token in between": lambda gpt: _call(gpt, [5], 4),
    "tokens without caches": lambda gpt: gpt(torch.tensor([[5, 6]])),
}
edits = st.one_of(
    st.sampled_from(list(EDITS)),
    st.tuples(st.sampled_from(WEIGHTS), st.sampled_from(list(ALIASES)), st.sampled_from(list(WRITES))),
)
# edits, in inference mode or not; how many tokens the next prompt has in common with what went before; streamed
turns = st.tuples(st.lists(edits, max_size=2), st.booleans(), st.integers(0, 30), st.booleans())


def edit(gpt: Any, what: Any) -> None:
    try:
        if isinstance(what, str):
            EDITS[what](gpt)
        else:
            name, alias, write = what
            WRITES[write](ALIASES[alias](gpt, name))
    except RuntimeError as error:
        if "Inplace update to inference tensor" not in str(error):  # what torch refuses
            raise


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the answers are drawn from; drawn are the same tokens, whatever they say."""
    from litgpt.generate import base

    found: list[Tensor] = []

    def sample(given: Tensor, **_: Any) -> Tensor:
        found.append(given[:, -1].float().clone())
        return torch.tensor([[11 + len(found) % 5]])

    monkeypatch.setattr(base, "sample", sample)
    return found


def answer(llm: Any, prompt: list[int], stream: bool, logits: list[Tensor]) -> list[Tensor]:
    logits.clear()
    found = llm.generate(prompt, max_new_tokens=NEW, stream=stream)
    for _ in found if stream else ():
        pass
    return [*logits]


def converse(name: str, kv_cache: str, conversation: list[Any], logits: list[Tensor]) -> None:
    """Hold the conversation, and compare every answer with that of a fresh model that is what this one now is."""
    model = upcast.patch(make(name), kv_cache=kv_cache)
    assert_patched(model)
    llm, said = llm_of(model), TOKENS[:12]
    answer(llm, said, False, logits)
    for changes, inference, shared, stream in conversation:
        for change in changes:
            with torch.inference_mode(inference), torch.no_grad():
                edit(model, change)
        prompt = [*said[:shared], *TOKENS[20:24]][:16]
        fresh = llm_of(without_fusion(model))
        got = answer(llm, prompt, stream, logits)
        want = answer(fresh, prompt, stream, logits)
        assert len(got) == len(want) == NEW
        for ours, theirs in zip(got, want, strict=True):
            assert relative_error(ours, theirs) < LIMITS[kv_cache], (changes, prompt)
        said = [*prompt, *(11 + i % 5 for i in range(1, NEW + 1))]


SLOWLY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SLOWLY
@given(st.sampled_from(MODELS), st.sampled_from(list(LIMITS)), st.lists(turns, min_size=1, max_size=4))
def test_answers_are_those_of_a_fresh_model(
    logits: list[Tensor], name: str, kv_cache: str, conversation: list[Any]
) -> None:
    converse(name, kv_cache, conversation, logits)


@pytest.mark.parametrize("change", [each for each in EDITS if each != "no hooks"])
@pytest.mark.parametrize("name", MODELS)
def test_one_edit(logits: list[Tensor], name: str, change: str) -> None:
    converse(name, "float32", [([], False, 12, False), ([change], True, 19, False)], logits)


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("weight", WEIGHTS[:5])
def test_one_write(logits: list[Tensor], weight: str, alias: str) -> None:
    turns = [([(weight, alias, write)], False, 9, False) for write in WRITES]
    converse(MODELS[0], "float32", turns, logits)


# of one block's; LitGPT throws them away before a longer prompt
BROKEN: dict[str, Callable[[Any], object]] = {
    "another kind": lambda attn: setattr(attn, "kv_cache", nn.Identity()),
    "none": lambda attn: setattr(attn, "kv_cache", None),
    "keys of another shape": lambda attn: setattr(attn.kv_cache, "k", attn.kv_cache.k[0]),
    "keys of another dtype": lambda attn: setattr(attn.kv_cache, "k", attn.kv_cache.k.double()),
    "fewer rows": lambda attn: setattr(attn.kv_cache, "v", attn.kv_cache.v[:, :, :4]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_caches_that_are_none_are_thrown_away(logits: list[Tensor], name: str) -> None:
    model = upcast.patch(make(MODELS[0]))
    llm = llm_of(model)
    answer(llm, TOKENS[:12], False, logits)
    BROKEN[name](_block(model).attn)
    got = answer(llm, TOKENS, False, logits)
    want = answer(llm_of(without_fusion(model)), TOKENS, False, logits)
    assert all(relative_error(*each) < LIMITS["float16"] for each in zip(got, want, strict=True))

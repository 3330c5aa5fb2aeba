"""Transformers' caches in float16, and the fused forwards: against float32, with everything that handles a cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import relative_error, rounded
from tests.transformers_models import IDS, MOE, TEXT, make

transformers = pytest.importorskip("transformers")

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grouped heads": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "q and k norms": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
    "one head each": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "sliding windows": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8, "sliding_window": 5}),
    "sinks": ("GptOssForCausalLM", "GptOssConfig", {**TEXT, **MOE, "head_dim": 8, "sliding_window": 5}),
    "latent": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**TEXT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
        | {"topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 4, "moe_intermediate_size": 16},
    ),
    "encoder and decoder": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
        | {"decoder_start_token_id": 2, "forced_eos_token_id": None},
    ),
}
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])  # on the left, as generate wants it
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {"attention_mask": PADDED},
    "beams": {"num_beams": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 3},
}


def generated(model: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """Return the logits of a generation as one tensor, and its cache."""
    fixed = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    kinds = {"return_dict_in_generate": True, "output_logits": True}
    result = model.generate(IDS, **{"attention_mask": torch.ones_like(IDS), **fixed, **kinds, **options})
    return torch.stack(result.logits), result.past_key_values


def layers(cache: Any) -> list[Any]:
    return list(getattr(cache, "self_attention_cache", cache).layers)


def lively(kind: str, attention: str = "sdpa") -> Any:
    name, config, sizes = KINDS[kind]
    model = make(name, config, {**sizes, "attn_implementation": attention})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.filterwarnings("ignore")  # Transformers' own, about flags and chunks
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_float32(kind: str, way: str, attention: str) -> None:
    if (kind, way) == ("encoder and decoder", "chunks"):
        pytest.skip("Transformers prefills decoders in chunks only")
    if kind == "sinks" and attention == "sdpa":
        attention = "eager"  # gpt-oss has no other
    model = lively(kind, attention)
    want, _ = generated(rounded(model), **WAYS[way])
    upcast.patch(model)
    got, cache = generated(model, **WAYS[way])
    assert relative_error(got, want) < 1e-3
    if cache is not None:
        stored = [layer for layer in layers(cache) if isinstance(layer.keys, upcast.HalfWeight)]
        held = [layer for layer in layers(cache) if layer.keys is not None]
        windows = way == "static" and kind in ("sliding windows", "sinks")  # static windows stay Transformers' own
        assert windows or (stored and len(stored) == len(held))


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_cache_is_one_argument_away(kind: str) -> None:
    model = lively(kind, "eager" if kind == "sinks" else "sdpa")
    want, _ = generated(rounded(model))
    upcast.patch(model, kv_cache="float32")
    got, cache = generated(model)
    assert relative_error(got, want) < 1e-5
    assert all(layer.keys.dtype == torch.float32 and type(layer.keys) is torch.Tensor for layer in layers(cache))


def test_the_fused_forwards_and_the_kernel_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upcast.patch(lively("grouped heads"))
    kinds = [type(module.__dict__.get("forward")).__name__ for module in model.modules()]
    counts = {"FusedRMSNorm": 5, "FusedGatedMLP": 2, "FusedAttention": 2, "FusedDecoderLayer": 2}
    assert {name: kinds.count(name) for name in counts} == counts
    for layer in model.model.layers:  # what runs where a layer cannot be one call
        del layer.__dict__["forward"]
    dtypes = []
    attention = upcast.kernels.active().attention
    monkeypatch.setattr(
        upcast.kernels.active(), "attention", lambda q, k, v, **o: (dtypes.append(k.dtype), attention(q, k, v, **o))[1]
    )
    generated(model)
    assert dtypes == [torch.float16] * 2 * 9  # two layers, and nine tokens after the prompt's
    assert all(m.__dict__["forward"].calls for m in model.modules() if type(m).__name__ == "LlamaAttention")


def test_a_value_beyond_float16_widens_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    model = lively("grouped heads")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(30.0)
        model.model.layers[1].input_layernorm.weight.fill_(3000.0)
    want, _ = generated(rounded(model))
    upcast.patch(model)
    got, cache = generated(model)
    assert relative_error(got, want) < 1e-3
    assert [type(layer.keys).__name__ for layer in cache.layers] == ["HalfWeight", "Tensor"]
    assert capsys.readouterr().err.count("the KV cache of layer 1 goes to float32") == 1


OPERATIONS: dict[str, Callable[[Any], object]] = {
    "crop": lambda cache: cache.crop(4),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_to_a_cache_between_calls(operation: str) -> None:
    model = lively("grouped heads")
    caches, results = [], []
    for each in (rounded(model), upcast.patch(model)):
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            each(IDS, past_key_values=cache)
            OPERATIONS[operation](cache)
            token = IDS[:, :1].repeat(2 if operation == "repeat" else 1, 1)
            results.append(each(token, past_key_values=cache).logits)
        caches.append(cache)
    assert relative_error(results[1], results[0]) < 1e-3
    assert caches[1].get_seq_length() == caches[0].get_seq_length()


def test_a_cache_is_half_the_bytes() -> None:
    model = upcast.patch(lively("grouped heads"))
    _, cache = generated(model)
    assert cache.layers[0].keys.nbytes * 2 == cache.layers[0].keys.numel() * 4


def test_unpatching_leaves_no_hooks() -> None:
    model = lively("grouped heads")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    upcast.unpatch(upcast.patch(model))
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs


def test_gradients_take_the_unfused_path() -> None:
    model = lively("grouped heads")
    want = rounded(model)
    upcast.patch(model)
    for each in (want, model):
        each.requires_grad_(False)
        each.model.norm.weight.requires_grad_()
        each(IDS, labels=IDS).loss.backward()
    assert relative_error(model.model.norm.weight.grad, want.model.norm.weight.grad) < 1e-5

"""LitGPT's fused forwards equal the unfused patched model, and really run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import relative_error
from tests.fused_models import IDS, LENGTH, LIMITS, NAMES, PROMPT, calls, fused_of, modules_only, pair, steps
from upcast import kernels
from upcast.integrations.litgpt.modules import FusedAttention
from upcast.integrations.litgpt.moe import FusedMoE

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")


# --- equal to the unfused model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_every_config_equals_its_unfused_model(name: str, kv_cache: str) -> None:
    model, plain = pair(name, kv_cache)
    modular = modules_only(model)
    for batch in (1, 2):
        want = plain(IDS[:batch])
        assert relative_error(model(IDS[:batch]), want) < 1e-5
        assert relative_error(modular(IDS[:batch]), want) < 1e-5
        for maxp1 in (True, False):
            runs = (steps(each, batch, maxp1) for each in (model, modular, plain))
            for got, also, want in zip(*runs, strict=True):
                assert relative_error(got, want) < LIMITS[kv_cache]
                assert relative_error(also, want) < LIMITS[kv_cache]
    dtypes = {getattr(torch, kv_cache)}
    assert {block.attn.kv_cache.k.dtype for block in model.transformer.h} == dtypes
    assert {block.attn.kv_cache.v.dtype for block in model.transformer.h} == dtypes


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_fused_ran_fused(name: str) -> None:
    """Without a cache, in prefill and in decoding: nothing above passes by falling back."""
    model, _ = pair(name, "float16")
    modular = modules_only(model)
    for each in (model, modular):
        each(IDS)
        list(steps(each, 1, True))
    # LitGPT adds its boolean mask to softcapped scores; to equal it, such a prefill is left to it.
    expected = 1 + LENGTH - PROMPT + (model.config.attention_logit_softcapping is None)
    attentions = [forward for forward in fused_of(modular).values() if isinstance(forward, FusedAttention)]
    assert [forward.calls for forward in attentions] == [expected] * len(model.transformer.h)
    assert model.__dict__["forward"].calls == expected
    moe = model.config.mlp_class_name == "LLaMAMoE"
    mixtures = [forward for forward in fused_of(modular).values() if isinstance(forward, FusedMoE)]
    dense = model.config.first_k_dense_replace or 0
    assert [forward.calls for forward in mixtures] == [1 + LENGTH - PROMPT + 1] * moe * (len(attentions) - dense)


CHANGES = [
    ("interleaved rope", {"rope_interleave": True}),
    ("partial interleaved rope", {"rope_interleave": True, "rotary_percentage": 0.5}),
    ("no rope at all", {"rotary_percentage": 0.0}),
    ("rope of an odd number of elements", {"rotary_percentage": 0.4}),
    ("yarn", {"rope_adjustments": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 32}}),
    ("a softcap", {"attention_logit_softcapping": 5.0}),
    ("a softcap and a window", {"attention_logit_softcapping": 5.0, "sliding_window_size": 15}),
    ("a window in one layer", {"sliding_window_size": 15, "sliding_window_indices": [0, 1, 0]}),
    ("an attention scale", {"attention_scores_scalar": 3}),
    ("norms of LayerNorm", {"norm_class_name": "LayerNorm", "norm_qk": True}),
    ("olmo2 norms of q and k", {"norm_qk": True, "norm_qk_type": "olmo2"}),
    ("parallel residual", {"parallel_residual": True, "shared_attention_norm": True}),
    ("biases", {"bias": True, "lm_head_bias": True}),
    ("GptNeoxMLP", {"mlp_class_name": "GptNeoxMLP", "gelu_approximate": "tanh"}),
    ("GemmaMLP, exact gelu", {"mlp_class_name": "GemmaMLP", "gelu_approximate": "none"}),
]


@pytest.mark.parametrize("changes", [pytest.param(c, id=n) for n, c in CHANGES])
def test_options_on_top_of_a_config(changes: dict[str, Any]) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32", **changes)
    for each in (model, modules_only(model)):
        assert relative_error(each(IDS), plain(IDS)) < 1e-5
        for maxp1 in (True, False):
            for got, want in zip(steps(each, 2, maxp1), steps(plain, 2, maxp1), strict=True):
                assert relative_error(got, want) < 1e-5
        assert calls(each)


def test_chunks_of_the_head() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    for chunk in (1, 4, 19, 50):
        got, want = model(IDS, lm_head_chunk_size=chunk), plain(IDS, lm_head_chunk_size=chunk)
        assert [part.shape for part in got] == [part.shape for part in want]
        assert relative_error(torch.cat(got, 1), torch.cat(want, 1)) < 1e-5


def test_chunks_of_the_prompt_and_a_batch_smaller_than_the_cache() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    for each in (model, plain):
        each.set_kv_cache(3, 40)
    for start, end in ((0, 7), (7, 8), (8, 19), (3, 9)):  # the last one writes again what was there
        positions = torch.arange(start, end)
        assert relative_error(model(IDS[:, start:end], positions), plain(IDS[:, start:end], positions)) < 1e-5


POSITIONS = [
    ("two dimensions", torch.arange(6).repeat(2, 1)),
    ("different ones per row", torch.stack([torch.arange(6), torch.arange(4, 10)])),
    ("with a gap", torch.tensor([0, 1, 2, 3, 4, 7])),
    ("backwards", torch.arange(6).flip(0)),
]


@pytest.mark.parametrize("kv_cache", ["float32", "float16"])
@pytest.mark.parametrize("positions", [pytest.param(p, id=n) for n, p in POSITIONS])
def test_unusual_positions(positions: Tensor, kv_cache: str) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", kv_cache)
    for each in (model, plain):
        each.set_kv_cache(2, 16)
    assert relative_error(model(IDS[:, :6], positions), plain(IDS[:, :6], positions)) < LIMITS[kv_cache]
    assert model.transformer.h[0].attn.kv_cache.k.dtype == getattr(torch, kv_cache)  # LitGPT would have recast it


def test_a_mask_of_the_user_s_own_counts() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    for each in (model, plain):
        each.set_kv_cache(2, 16)
        each.mask_cache[:, :, :, 2] = False  # such as padding
        each.mask_cache[:, :, 2, 2] = True
    positions = torch.arange(6)
    usual = model(IDS[:, :6])
    got, want = model(IDS[:, :6], positions), plain(IDS[:, :6], positions)
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, usual) > 1e-3


@pytest.mark.parametrize("maxp1", [3, 20])
def test_a_bound_that_is_not_the_last_position(maxp1: int) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    for each in (model, plain):
        each.set_kv_cache(2, 32)
    positions = torch.arange(6)
    got = model(IDS[:, :6], positions, input_pos_maxp1=maxp1)
    assert relative_error(got, plain(IDS[:, :6], positions, input_pos_maxp1=maxp1)) < 1e-5


ERRORS = [
    ("no cache", None, torch.arange(6), {}),
    ("beyond the cache", 4, torch.arange(6), {}),
    ("another length", 16, torch.arange(5), {}),
    ("a bound beyond the model", 16, torch.arange(6), {"input_pos_maxp1": 1000}),
    ("positions beyond the model", 16, torch.arange(200, 206), {}),
]


@pytest.mark.parametrize(("size", "positions", "extra"), [pytest.param(*e, id=n) for n, *e in ERRORS])
def test_litgpt_s_errors_stay(size: int | None, positions: Tensor, extra: dict[str, int]) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    raised = []
    for each in (model, plain):
        if size is not None:
            each.set_kv_cache(2, size)
        with pytest.raises(Exception) as error:  # noqa: PT011 - whatever LitGPT raises
            each(IDS[:, :6], positions, **extra)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


def test_an_empty_batch() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    assert model(IDS[:0]).shape == plain(IDS[:0]).shape == (0, LENGTH, 320)


def test_without_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_active", kernels.portable)
    model, plain = pair("Gemma-3-4b-it", "float16")
    for got, want in zip(steps(model, 2, True), steps(plain, 2, True), strict=True):
        assert relative_error(got, want) < 1e-3
    assert calls(model)

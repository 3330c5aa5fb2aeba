"""LitGPT's generation loops and the float16 KV cache of a fused model."""

from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.conftest import relative_error
from tests.fused_models import (
    IDS,
    LENGTH,
    LIMITS,
    NAMES,
    PROMPT,
    calls,
    make,
    pair,
    without_fusion,
)
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast import kernels
from upcast.integrations.litgpt import gpt

LLAMA = "SmolLM2-135M-Instruct"
AT_ONCE = [0, 64]  # positions for which all blocks run in one call: none, all
pytestmark = pytest.mark.usefixtures("inference_on_one_thread")


# --- generation -------------------------------------------------------------------------------------------------------


def _generate(model: Any) -> list[int]:
    from litgpt.generate.base import generate

    model.set_kv_cache(1, 40)
    return list(generate(model, IDS[0, :PROMPT], max_returned_tokens=40, temperature=0.0).tolist())


@pytest.mark.usefixtures("no_other_gpt")
@pytest.mark.parametrize("at_once", AT_ONCE)
def test_litgpt_s_loops_compute_one_position(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from litgpt.generate import base

    model, plain = pair("Gemma-3-4b-it", "float32")
    own = base.next_token._upcast_original, base.batched_next_token._upcast_original
    tokens = _generate(plain)
    widths: list[int] = []
    linear = kernels.native.linear

    def count(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(x.shape[1])
        return linear(x, weight, bias)

    given: list[int] = []
    block, blocks = kernels.native.block, kernels.native.blocks

    def give(*args: Any) -> Tensor | None:
        out = block(*args)
        given.append(0 if out is None else out.shape[1])
        return out

    def give_all(*args: Any) -> tuple[Tensor, int]:
        out, done = blocks(*args)
        given.append(out.shape[1])
        return out, done

    monkeypatch.setattr(gpt, "_AT_ONCE", at_once)
    layers = len(model.transformer.h)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.native, "linear", count)  # the head; the blocks call none
        patch.setattr(kernels.native, "block", give)
        patch.setattr(kernels.native, "blocks", give_all)
        assert _generate(model) == tokens
        assert widths == [] if at_once else [1] * (40 - PROMPT)  # else the last call gives the logits, too
        prefill = [1] if at_once else [PROMPT] * (layers - 1) + [1]
        assert given == prefill + [1] * (40 - PROMPT - 1) * (1 if at_once else layers)
        assert model(IDS[:, :7]).shape[1] == 7
        assert given[-layers:] == [7] * layers
    rows = base.batched_next_token(model, torch.arange(7), IDS[:1, :7], {"temperature": 0.0})
    assert rows.shape == (1, 1)
    upcast.unpatch(model)
    assert (base.next_token, base.batched_next_token) == own


@pytest.mark.parametrize("at_once", AT_ONCE)
@pytest.mark.parametrize("name", NAMES)
def test_the_last_position_alone_is_that_of_all(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "_AT_ONCE", at_once)
    model, plain = pair(name, "float32")
    model.set_kv_cache(2, LENGTH)
    plain.set_kv_cache(2, LENGTH)
    positions = torch.arange(PROMPT)
    got = gpt.last_position(model, lambda: model(IDS[:, :PROMPT], positions)[:, -1:])
    assert relative_error(got, plain(IDS[:, :PROMPT], positions)[:, -1:]) < 1e-5
    token, after = IDS[:, PROMPT : PROMPT + 1], torch.tensor([PROMPT])  # sees the keys of all positions
    assert relative_error(model(token, after), plain(token, after)) < 1e-5


def test_a_watched_head_sees_every_position() -> None:
    from litgpt.generate import base

    model, _ = pair("SmolLM2-135M-Instruct", "float32")
    model.set_kv_cache(1, 40)
    for watched in (model.lm_head, model.transformer.ln_f, model):
        shapes: list[tuple[int, ...]] = []
        handle = watched.register_forward_hook(lambda _, args, output, shapes=shapes: shapes.append(output.shape[:2]))
        base.next_token(model, torch.arange(7), IDS[:1, :7], temperature=0.0)
        handle.remove()
        assert shapes == [(1, 7)]


@pytest.mark.usefixtures("no_other_gpt")
@pytest.mark.parametrize("before", [False, True], ids=["patched first", "compiled first"])
def test_a_compiled_next_token_runs_fused_and_says_so_once(
    before: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.generate import base

    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    own, unpatched = base.next_token, make(LLAMA)
    if before:  # as LitGPT's scripts do
        own = getattr(own, "_upcast_original", own)
        monkeypatch.setattr(base, "next_token", torch.compile(own, backend=keep))
    model, plain = pair(LLAMA, "float32")
    compiled = base.next_token if before else torch.compile(base.next_token, backend=keep)
    for each in (model, plain, unpatched):
        each.set_kv_cache(1, 40)
    ran = calls(model)
    for positions in (torch.arange(7), torch.tensor([7])):
        ids = IDS[:1, : len(positions)]
        assert compiled(model, positions, ids, temperature=0.0) == own(plain, positions, ids, temperature=0.0)
    assert calls(model) > ran
    assert not graphs
    assert capsys.readouterr().err.count("GPT is not compiled") == 1
    compiled(unpatched, torch.arange(7), IDS[:1, :7], temperature=0.0)
    assert graphs


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_cache_takes_half_the_bytes_and_dtypes_asked_for_stay() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float16")
    model.set_kv_cache(1, 64)
    plain.set_kv_cache(1, 64)
    caches = [each.transformer.h[0].attn.kv_cache for each in (model, plain)]
    assert 2 * caches[0].k.nbytes == caches[1].k.nbytes
    model.set_kv_cache(1, 64, dtype=torch.float32)
    model(IDS[:1, :3], torch.arange(3))
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.float32


def large_keys(model: Any, factor: float) -> Any:
    with torch.no_grad():
        attn = model.transformer.h[1].attn
        start = attn.config.n_head * attn.config.head_size
        attn.qkv.weight[start:] *= 30
        model.transformer.h[1].norm_1.weight *= factor
    return model


@pytest.mark.parametrize("unusual", [False, True], ids=["fused", "LitGPT's own"])
def test_a_value_beyond_float16_widens_its_layer_once(unusual: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = upcast.patch(large_keys(make("SmolLM2-135M-Instruct"), 3e4))
    plain = without_fusion(model)
    positions = torch.arange(6).repeat(1, 1) if unusual else torch.arange(6)
    for _ in range(2):
        for each in (model, plain):
            each.set_kv_cache(1, 32)
        for _ in range(2):
            got, want = model(IDS[:1, :6], positions), plain(IDS[:1, :6], positions)
            assert relative_error(got, want) < 1e-3
    dtypes = [block.attn.kv_cache.k.dtype for block in model.transformer.h]
    assert dtypes == [torch.float16, torch.float32, torch.float16]
    assert plain.transformer.h[1].attn.kv_cache.k.abs().max() > 65504
    assert capsys.readouterr().err.count("the KV cache of layer 1 goes to float32") == 1


def test_what_was_in_the_cache_survives_widening() -> None:
    model = upcast.patch(make("SmolLM2-135M-Instruct"))
    plain = without_fusion(model)
    for each in (model, plain):
        each.set_kv_cache(1, 32)
        each(IDS[:1, :6], torch.arange(6))
        large_keys(each, 3e4)
    got, want = model(IDS[:1, 6:7], torch.tensor([6])), plain(IDS[:1, 6:7], torch.tensor([6]))
    assert relative_error(got, want) < 1e-3
    kept, whole = (each.transformer.h[1].attn.kv_cache.k[:, :, :6] for each in (model, plain))
    assert relative_error(kept, whole) < 1e-3


def test_kv_cache_is_one_of_two() -> None:
    with pytest.raises(upcast.UpcastError, match="kv_cache='int8'; it must be one of float16, float32"):
        upcast.patch(make("pythia-160m"), kv_cache="int8")


def test_load_litgpt_passes_it_on(tmp_path: Any) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    for kv_cache in LIMITS:
        model = upcast.load_litgpt(folder, kv_cache=kv_cache)
        model.set_kv_cache(1)
        assert model.transformer.h[0].attn.kv_cache.v.dtype == getattr(torch, kv_cache)

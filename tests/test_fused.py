"""LitGPT's fused forwards: they equal the unfused patched model, really run, and leave no trace."""

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast import kernels
from upcast.integrations import litgpt_fused
from upcast.integrations.litgpt_modules import Fused, FusedAttention
from upcast.integrations.litgpt_stack import FusedGPT

pytest.importorskip("litgpt")

# Fields of a config that change the structure of a model rather than its size.
STRUCTURE = (
    *("norm_class_name", "norm_qk", "norm_qk_type", "post_attention_norm", "post_mlp_norm", "parallel_residual"),
    *("shared_attention_norm", "attn_bias", "rope_interleave", "bias", "mlp_class_name", "gelu_approximate"),
    *("scale_embeddings", "lm_head_bias", "norm_1", "norm_2"),
)
OPTIONAL = ("attention_scores_scalar", "attention_logit_softcapping", "final_logit_softcapping", "latent_attention")
LIMITS = {"float32": 1e-5, "float16": 1e-3}
LENGTH, PROMPT = 19, 14  # the sliding windows of small_config hold 16 positions: decoding wraps them


def _structure(name: str) -> tuple[Any, ...]:
    from litgpt import Config

    config = Config.from_name(name)
    heads = (config.n_query_groups == 1, config.n_query_groups == config.n_head, config.head_size * config.n_head)
    windows = (bool(config.sliding_window_size), str(config.sliding_window_indices)[:8], str(config.rope_indices)[:8])
    rope = (config.rope_n_elem == config.head_size, config.rope_n_elem % 2, str(sorted(config.rope_adjustments or ())))
    family = ("Gemma" in name, "OLMo" in name, heads[2] == config.n_embd)
    fields = tuple(getattr(config, field) for field in STRUCTURE)
    return (*fields, *(bool(getattr(config, field)) for field in OPTIONAL), *heads[:2], *windows, *rope, *family)


def _names() -> list[str]:
    from litgpt.config import name_to_config

    return list({_structure(name): name for name in reversed(name_to_config)}.values())


NAMES = _names()


def fused_of(model: nn.Module) -> dict[str, Fused]:
    found = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, Fused)}


def calls(model: nn.Module) -> int:
    return sum(forward.calls for forward in fused_of(model).values())


def without_fusion(model: Any) -> Any:
    """A copy of a patched model that runs LitGPT's own forwards."""
    plain = copy.deepcopy(model)
    litgpt_fused.remove(plain)
    assert not fused_of(plain)
    return plain


def make(name: str, **changes: Any) -> Any:
    """LitGPT's config ``name``, small, with seeded weights; vectors are not left at ones and zeros."""
    from litgpt import GPT

    torch.manual_seed(0)
    model = GPT(small_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def modules_only(model: Any) -> Any:
    """A copy of a patched model without the call per block: norms, attention and MLPs are fused one by one."""
    modular = copy.deepcopy(model)
    del modular.__dict__["forward"]
    assert not any(isinstance(forward, FusedGPT) for forward in fused_of(modular).values())
    return modular


def pair(name: str, kv_cache: str, **changes: Any) -> tuple[Any, Any]:
    model = upcast.patch(make(name, **changes), kv_cache=kv_cache)
    return model, without_fusion(model)


IDS = torch.randint(0, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def steps(model: Any, batch: int, maxp1: bool, **options: Any) -> Iterator[Tensor]:
    """Logits of a prefill and of every decoded position after it."""
    model.set_kv_cache(batch, LENGTH + 3)
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        extra = {"input_pos_maxp1": end} if maxp1 else {}
        yield model(IDS[:batch, start:end], torch.arange(start, end), **extra, **options)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Without gradients, and on one thread: tests of tiny models would mostly wait for the other one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


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
    moe = model.config.mlp_class_name == "LLaMAMoE"
    assert model.__dict__["forward"].calls == (0 if moe else expected)


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


# --- who looks inside sees what LitGPT shows --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "pythia-160m", "Gemma-3-4b-it", "Mixtral-8x7B-v0.1"])
def test_hooks_see_what_they_would_see(name: str) -> None:
    """Every module in turn is watched: the same calls with the same numbers, also of the cache."""
    model, plain = pair(name, "float32")
    for each in (model, plain):
        each.set_kv_cache(1, 32)
    for watched in [name for name, _ in model.named_modules() if ".h.1" in name or name.count(".") < 2]:
        seen: list[list[tuple[Tensor, ...]]] = [[], []]
        for each, notes in zip((model, plain), seen, strict=True):

            def note(_: nn.Module, args: Any, output: Any, notes: list[Any] = notes) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                notes.append(tuple(t.clone() for t in (*args, *outputs) if isinstance(t, Tensor)))

            handle = each.get_submodule(watched).register_forward_hook(note)
            each(IDS[:1, :5], torch.arange(5), input_pos_maxp1=5)
            handle.remove()
        assert len(seen[0]) == len(seen[1]), watched
        for got, want in zip(*seen, strict=True):
            assert [t.shape for t in got] == [t.shape for t in want], watched
            assert all(relative_error(a.float(), b.float()) < 1e-5 for a, b in zip(got, want, strict=True)), watched


def test_a_hook_can_change_what_flows() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    for each in (model, plain):
        each.transformer.h[1].mlp.fc_1.register_forward_hook(lambda _, args, output: output * 2)
    assert relative_error(model(IDS), plain(IDS)) < 1e-5
    assert relative_error(model(IDS), usual) > 1e-3


def test_the_call_per_block_comes_back_when_the_hooks_are_gone() -> None:
    model, _ = pair("SmolLM2-135M-Instruct", "float32")
    forward = model.__dict__["forward"]
    handle = model.transformer.h[1].mlp.proj.register_forward_hook(lambda *_: None)
    model(IDS)
    assert forward.calls == 0
    handle.remove()
    model(IDS)
    assert forward.calls == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(IDS)
    handle.remove()
    assert forward.calls == 1


def _other_eps(model: Any) -> None:
    model.transformer.h[1].norm_2.eps = 3.0


def _other_scale(model: Any) -> None:
    model.config.attention_scores_scalar = 1


def _other_numbers(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.fc_1.weight.mul_(2.0)


def _other_forward(model: Any) -> None:
    model.transformer.h[0].mlp.proj.forward = lambda x: x.sum() + torch.zeros(*x.shape[:2], 32)


def _other_parameter(model: Any) -> None:
    model.transformer.h[0].norm_1.weight = nn.Parameter(torch.full((32,), 3.0))


def _other_order(model: Any) -> None:
    model.transformer.h = nn.ModuleList(reversed(model.transformer.h))


@pytest.mark.parametrize(
    "change", [_other_eps, _other_scale, _other_numbers, _other_forward, _other_parameter, _other_order]
)
def test_changes_after_the_first_call_count(change: Any) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    assert model.__dict__["forward"].calls == 1
    for each in (model, plain):
        change(each)
    got = model(IDS)
    assert relative_error(got, plain(IDS)) < 1e-5
    assert relative_error(got, usual) > 1e-3


def test_a_replaced_layer_runs() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    new = nn.Linear(32, 96, bias=False)
    for each in (model, plain):
        each.transformer.h[1].mlp.fc_1 = new
    assert relative_error(model(IDS), plain(IDS)) < 1e-5
    assert relative_error(model(IDS), usual) > 1e-3


@torch.inference_mode(False)
def test_gradients_reach_vectors_and_inputs() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    for each in (model, plain):
        each(IDS).square().sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert wanted
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in wanted)
        if parameter.grad is not None:
            assert relative_error(parameter.grad, wanted[name]) < 1e-5
    model.requires_grad_(False)
    before = calls(model)
    model(IDS)  # gradients are on, but nothing asks for one
    assert calls(model) > before


# --- generation -------------------------------------------------------------------------------------------------------


def _generate(model: Any) -> list[int]:
    from litgpt.generate.base import generate

    model.set_kv_cache(1, 40)
    return list(generate(model, IDS[0, :PROMPT], max_returned_tokens=40, temperature=0.0).tolist())


def test_litgpt_s_loops_compute_one_position() -> None:
    from litgpt.generate import base

    gc.collect()  # models of other tests, never unpatched
    model, plain = pair("Gemma-3-4b-it", "float32")
    own = base.next_token._upcast_original, base.batched_next_token._upcast_original
    tokens = _generate(plain)
    widths: list[int] = []
    linear = kernels.native.linear

    def count(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(x.shape[1])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.native, "linear", count)  # the head; the blocks call none
        assert _generate(model) == tokens
        assert widths == [1] * (40 - PROMPT)
        assert model(IDS[:, :7]).shape[1] == 7
    rows = base.batched_next_token(model, torch.arange(7), IDS[:1, :7], {"temperature": 0.0})
    assert rows.shape == (1, 1)
    upcast.unpatch(model)
    assert (base.next_token, base.batched_next_token) == own


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


# --- traces and copies ------------------------------------------------------------------------------------------------


def _traces(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def test_unpatch_leaves_no_trace() -> None:
    model = make("Gemma-3-4b-it")
    model.set_kv_cache(1)
    model.clear_kv_cache()  # leaves a trace of LitGPT's own
    before = _traces(model)
    upcast.patch(model)
    assert _traces(model) != before
    list(steps(model, 1, True))
    model.clear_kv_cache()
    upcast.unpatch(model)
    assert _traces(model) == before
    with upcast.patched(model):
        assert fused_of(model)
    assert _traces(model) == before
    upcast.patch(model)
    model.set_kv_cache(1, 32)
    upcast.unpatch(model)  # with the cache still there: LitGPT's own from now on
    model(IDS[:1, :4], torch.arange(4))
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.float32


def test_a_forward_of_the_user_s_own_is_left_alone() -> None:
    model = make("SmolLM2-135M-Instruct")
    seen: list[int] = []
    mlp = model.transformer.h[0].mlp
    own = lambda x: seen.append(1) or type(mlp).forward(mlp, x)  # noqa: E731
    mlp.forward = own
    upcast.patch(model)
    model(IDS)
    assert seen == [1]
    upcast.unpatch(model)
    assert mlp.__dict__["forward"] is own


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_weights(copier: Any) -> None:
    model = upcast.patch(make("SmolLM2-135M-Instruct"))
    model.set_kv_cache(1, 32)
    want = model(IDS[:1, :6], torch.arange(6))
    other = copier(model)
    assert fused_of(other).keys() == fused_of(model).keys()
    for name, forward in fused_of(other).items():
        assert forward.module is other.get_submodule(name)
    before = calls(model)
    assert torch.equal(other(IDS[:1, :6], torch.arange(6)), want)
    assert calls(model) == before
    with torch.no_grad():
        other.lm_head.weight.zero_()
        other.transformer.h[0].attn.kv_cache.k.zero_()
    assert torch.equal(model(IDS[:1, :6], torch.arange(6)), want)
    upcast.unpatch(other)
    assert fused_of(model)
    assert not fused_of(other)


def test_other_models_are_left_alone() -> None:
    model = upcast.patch(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert not fused_of(model)


def test_what_stays_unfused_has_a_reason() -> None:
    model = upcast.patch(make("Mixtral-8x7B-v0.1", rotary_percentage=0.4))
    reasons = litgpt_fused.unfused(model)
    assert reasons["transformer.h.0.attn"] == "rope of an odd number of elements"
    assert "experts" in reasons["transformer.h.0.mlp"]
    assert not fused_of(model).keys() & reasons.keys()


REMARKS = [
    ("Mixtral-8x7B-v0.1", "not fused: {}transformer.h.0.mlp and 2 more (routing between experts; "),
    ("SmolLM2-135M-Instruct", ""),
]


@pytest.mark.parametrize(("name", "remark"), REMARKS)
def test_the_plan_and_the_report_say_what_stays_unfused(
    name: str, remark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litgpt import GPT

    monkeypatch.setenv("UPCAST_VERBOSE", "2")
    model = GPT(small_config(name))
    inside = torch.nn.ModuleDict({"language": GPT(small_config(name))})
    assert str(upcast.plan(inside)).count("not fused") == bool(remark)
    assert remark.format("language.") in str(upcast.plan(inside))
    assert remark.format("") in str(upcast.plan(model)).splitlines()[-1]
    upcast.patch(model)
    for text in (upcast.report(model), capsys.readouterr().err):
        assert text.count("not fused") == bool(remark)
        assert remark.format("") in text

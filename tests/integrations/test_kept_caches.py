"""Transformers' caches that the model makes itself, and that are kept, copied and written to: as without a patch."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import relative_error, rounded
from tests.integrations.transformers.test_cache import KINDS, OPERATIONS, layers, lively
from tests.transformers_models import IDS

transformers = pytest.importorskip("transformers")


def by_hand(model: Any, mode: Any, tokens: int = 5, **options: Any) -> tuple[torch.Tensor, Any]:
    """Return the last logits of a loop that is given no cache and hands on the model's own, and that cache."""
    found = []
    with mode():
        output = model(IDS, use_cache=True, **options)
        for step in range(tokens):
            found.append(output[0][:, -1] if options else output.logits[:, -1])
            cache = output[1] if options else output.past_key_values
            output = model(IDS[:, step : step + 1], past_key_values=cache, use_cache=True, **options)
    return torch.stack(found), cache


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "encoder and decoder"])
def test_a_cache_that_the_model_makes_is_downcast_when_it_comes_back(kind: str, mode: Any) -> None:
    model = lively(kind, "eager" if kind == "sinks" else "sdpa")
    want, before = by_hand(rounded(model), mode)
    upcast.patch(model)
    got, cache = by_hand(model, mode)
    assert relative_error(got, want) < 1e-3
    assert all(isinstance(layer.keys, upcast.HalfWeight) for layer in layers(cache))
    assert [layer.keys.shape for layer in layers(cache)] == [layer.keys.shape for layer in layers(before)]
    bytes_at_rest = sum(layer.keys.stored.nbytes for layer in layers(cache))
    assert 2 * bytes_at_rest == sum(layer.keys.nbytes for layer in layers(before))


def test_the_layers_run_as_one_call_over_such_a_cache() -> None:
    model = upcast.patch(lively("grouped heads"))
    by_hand(model, torch.no_grad)
    assert [layer.__dict__["forward"].calls for layer in model.model.layers] == [5, 5]


def test_without_no_grad_the_cache_keeps_its_gradients() -> None:
    model = lively("grouped heads")
    plain = rounded(model)
    upcast.patch(model)
    caches = []
    for each in (plain, model):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        output = each(IDS, use_cache=True)
        output = each(IDS[:, :1], past_key_values=output.past_key_values)
        output.logits.square().mean().backward()
        caches.append(output.past_key_values.layers[0])
    assert type(caches[1]) is type(caches[0])
    assert caches[1].keys.requires_grad
    grads = [each.model.layers[0].input_layernorm.weight.grad for each in (plain, model)]
    assert relative_error(grads[1], grads[0]) < 1e-4


def test_what_float16_does_not_hold_stays_as_the_model_made_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = lively("grouped heads")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(30.0)
        model.model.layers[1].input_layernorm.weight.fill_(3000.0)
    want, _ = by_hand(rounded(model), torch.no_grad)
    upcast.patch(model)
    got, cache = by_hand(model, torch.no_grad)
    assert relative_error(got, want) < 1e-3
    assert [type(layer.keys).__name__ for layer in cache.layers] == ["HalfWeight", "Tensor"]
    assert capsys.readouterr().err.count("the KV cache of layer 1 stays in float32") == 1


def filled(model: Any, which: str = "growing") -> Any:
    options: dict[str, Any] = {"config": model.config}
    makers = {
        "growing": lambda: transformers.DynamicCache(**options),
        "growing, of no config": transformers.DynamicCache,
        "static": lambda: transformers.StaticCache(**options, max_cache_len=16),
    }
    cache = makers[which]()
    with torch.no_grad():
        model(IDS, past_key_values=cache, cache_position=torch.arange(7))
    return cache


def saved(cache: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "protocol 2": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "torch.save": saved,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("which", ["growing", "growing, of no config", "static"])
@pytest.mark.parametrize("kind", ["grouped heads", "sliding windows", "latent"])
def test_caches_are_kept_and_copied(kind: str, which: str, way: str) -> None:
    if which == "static" and kind == "sliding windows":
        pytest.skip("those layers are Transformers' own")
    model = lively(kind)
    plain = rounded(model)
    upcast.patch(model)
    cache = filled(model, which)
    kept = COPIES[way](cache)
    assert isinstance(kept.layers[0].keys, upcast.HalfWeight) is (way == "deepcopy")
    if way != "deepcopy":  # which stays here; a file may be read where upcast is not
        assert b"upcast" not in pickle.dumps(cache)
        assert [type(layer) for layer in kept.layers] == [type(layer).original for layer in cache.layers]
        assert all(layer.keys.dtype == torch.float32 for layer in kept.layers)
    options = {"cache_position": torch.tensor([7])}
    reference = filled(plain, which)
    with torch.no_grad():
        want = plain(IDS[:, :1], past_key_values=reference, **options).logits
        for each in (kept, cache):  # they do not share what is written now
            assert relative_error(model(IDS[:, :1], past_key_values=each, **options).logits, want) < 1e-3
        elsewhere = COPIES[way](filled(model, which))
        assert relative_error(plain(IDS[:, :1], past_key_values=elsewhere, **options).logits, want) < 1e-3


def test_what_generate_returns_is_kept() -> None:
    model = upcast.patch(lively("grouped heads"))
    result = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    kept = pickle.loads(pickle.dumps(result))
    assert torch.equal(kept.sequences, result.sequences)
    assert torch.equal(kept.past_key_values.layers[0].keys, result.past_key_values.layers[0].keys.clone())


def _crop(cache: Any) -> None:
    cache.crop(3)


def _reset(cache: Any) -> None:
    cache.reset()


def _assign(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys * 0.5, layer.values.clone()


def _write(cache: Any) -> None:
    cache.layers[0].keys[:, :, :2] = 0.25
    cache.layers[1].values.mul_(2)


def _raw(cache: Any) -> None:
    assert cache.layers[0].keys.numpy().dtype == "float32"


def _beyond(cache: Any) -> None:
    cache.layers[0].values = cache.layers[0].values * 1e6


HANDLED: dict[str, Callable[[Any], None]] = {
    **{name: lambda cache, act=act: act(cache) for name, act in OPERATIONS.items()},  # type: ignore[misc]
    "crop less": _crop,
    "reset": _reset,
    "assign": _assign,
    "write": _write,
    "raw memory": _raw,
    "beyond": _beyond,
}


@pytest.mark.parametrize("operation", HANDLED)
@pytest.mark.parametrize("kind", ["grouped heads", "one head each", "latent"])
def test_what_a_program_does_to_a_cache(kind: str, operation: str) -> None:
    model = lively(kind)
    plain = rounded(model)
    upcast.patch(model)
    logits, rows = [], []
    for each in (plain, model):
        cache = filled(each)
        HANDLED[operation](cache)
        ids = IDS[:, :1].repeat(cache.layers[0].keys.shape[0] // 2, 1)
        with torch.no_grad():
            logits += [each(ids, past_key_values=cache).logits for _ in range(3)][-1:]
        rows.append([tuple(layer.keys.shape) for layer in cache.layers])
        assert all(keys.dtype == values.dtype == torch.float32 for keys, values, *_ in cache)
    assert rows[0] == rows[1]
    assert relative_error(logits[1], logits[0]) < 2e-3


def test_what_was_handed_out_stays() -> None:
    """A crop and new rows do not change the tensors that someone took from the cache before, nor those of a copy."""
    model = upcast.patch(lively("grouped heads"))
    cache = filled(model)
    with torch.no_grad():
        model(IDS[:, :1], past_key_values=cache)
        taken, before = cache.layers[0].keys, cache.layers[0].keys.clone()
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]
        cache.crop(4)
        model(IDS[:, 3:6], past_key_values=cache)
        assert torch.equal(taken, before)
        assert torch.equal(branch.layers[0].keys, before)
        model(IDS[:, 1:2], past_key_values=branch)
        after = branch.layers[0].keys.clone()
        model(IDS[:, 2:3], past_key_values=cache)
    assert torch.equal(branch.layers[0].keys, after)
    assert torch.equal(after[:, :, :8], before)


def test_a_cache_goes_from_inference_mode_out_and_back() -> None:
    model = lively("grouped heads")
    plain = rounded(model)
    upcast.patch(model)
    modes = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]
    for kernels in ("native", "portable"):
        logits = []
        for each in (plain, model):
            upcast.kernels.use(kernels)
            cache = transformers.DynamicCache(config=each.config)
            for step, mode in enumerate(modes):
                with mode():
                    out = each(IDS[:, step : step + 1], past_key_values=cache).logits
            logits.append(out)
        upcast.kernels.use("auto")
        assert relative_error(logits[1], logits[0]) < 1e-3
        assert isinstance(cache.layers[0].keys, upcast.HalfWeight)


def test_assisted_generation() -> None:
    model, assistant = lively("grouped heads"), lively("grouped heads")
    want = rounded(model).generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    upcast.patch(model)
    upcast.patch(assistant)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = model.generate(IDS[:1], assistant_model=assistant, **options)
    assert torch.equal(got, want)
    assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=2, **options), want)


def test_caches_of_other_kinds_are_left_alone() -> None:
    model = upcast.patch(lively("grouped heads"))
    cache = transformers.DynamicCache(config=model.config)
    cache.offloading = True
    upcast.integrations.transformers.kv_cache.downcast(cache, set())
    assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}
    windows = transformers.StaticCache(config=lively("sliding windows").config, max_cache_len=8)
    upcast.integrations.transformers.kv_cache.downcast(windows, set())
    assert {type(layer).__name__ for layer in windows.layers} == {"StaticSlidingWindowLayer"}

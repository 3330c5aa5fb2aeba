"""One native call per decoder layer and token: against the module by module path, and everything that must undo it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import relative_error, rounded
from tests.integrations.transformers.test_cache import generated
from tests.transformers_models import IDS, TEXT, make
from upcast.integrations.transformers.decoder_layer import FusedDecoderLayer
from upcast.kernels import native

transformers = pytest.importorskip("transformers")

BIASED = {"attention_bias": True, "mlp_bias": True}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Llama with biases": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, **BIASED}),
    "one group": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 1, "head_dim": 16}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": None}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
}
TOKENS = 10  # the first comes out of the prompt's forward, the others are decoded


def lively(kind: str = "Llama", **options: Any) -> Any:
    name, config, sizes = KINDS[kind]
    model = make(name, config, {**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() >= 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def calls(model: Any) -> list[int]:
    """Return how often each layer ran as one native call."""
    forwards = [layer.__dict__["forward"] for layer in model.model.layers]
    assert all(isinstance(forward, FusedDecoderLayer) for forward in forwards)
    return [forward.calls for forward in forwards]


def one_by_one(model: Any) -> Any:
    """Take the layers' forwards away; those of their modules stay."""
    for layer in model.model.layers:
        del layer.__dict__["forward"]
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_one_call_per_layer(kind: str) -> None:
    want, _ = generated(rounded(lively(kind)))
    model = upcast.patch(lively(kind))
    got, cache = generated(model)
    assert calls(model) == [TOKENS - 1] * 2
    assert relative_error(got, want) < 1e-3
    assert cache.get_seq_length() == IDS.shape[1] + TOKENS - 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_call_equals_its_modules(kind: str, options: dict[str, Any]) -> None:
    want, _ = generated(one_by_one(upcast.patch(lively(kind))), **options)
    model = upcast.patch(lively(kind))
    got, _ = generated(model, **options)
    assert calls(model) == [TOKENS - 1] * 2
    assert relative_error(got, want) < 1e-5


def in_chunks(model: Any, sizes: list[int], ids: torch.Tensor, inference: bool = False) -> torch.Tensor:
    """Return the logits of ``ids``, which the model is given so many at a time."""
    cache, found, at = transformers.DynamicCache(config=model.config), [], 0
    with torch.inference_mode() if inference else torch.no_grad():
        for size in sizes:
            out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
            found, at = [*found, out.logits], at + size
    assert at == ids.shape[1]
    return torch.cat(found, 1)


CHUNKS = [[4, 1, 3, 12], [1, 19], [7, 13], [10, 5, 5]]  # of two rows: up to 8 all layers are one call
LONG = torch.arange(40).view(2, 20) % 100 + 3


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_further_chunks_are_one_call_per_layer(kind: str, sizes: list[int], inference: bool) -> None:
    model = upcast.patch(lively(kind))
    got = in_chunks(model, sizes, LONG, inference)
    assert calls(model) == [len(sizes) - 1] * 2
    assert relative_error(got, in_chunks(rounded(lively(kind)), sizes, LONG)) < 1e-3
    # Sums in another order may round a number of the float16 cache to its other neighbour.
    assert relative_error(got, in_chunks(one_by_one(upcast.patch(lively(kind))), sizes, LONG)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_drafted_tokens_and_batches_get_the_bits_of_single_tokens(kind: str) -> None:
    model, sizes = upcast.patch(lively(kind)), [12, 6, 2]
    single = in_chunks(model, [12, *[1] * 8], LONG)
    assert torch.equal(in_chunks(model, sizes, LONG), single)
    assert torch.equal(in_chunks(model, sizes, LONG[1:]), single[1:])
    assert calls(model)[0] >= 8


MASKED = {  # which positions of a row of 20, which come as 8 and 6 and 6; how many of the last two are native calls
    "on the left": (slice(0, 3), 2),
    "on the right": (slice(17, 20), 1),
    "in between": (slice(4, 6), 0),
    "a whole chunk": (slice(14, 20), 1),
}


@pytest.mark.parametrize("where", MASKED)
def test_padding_on_the_left_is_within_the_call_and_other_masks_are_not(where: str) -> None:
    mask = torch.ones(2, 20, dtype=torch.bool)
    masked, within = MASKED[where]
    mask[0, masked] = False
    plain, model = rounded(lively()), upcast.patch(lively())
    with torch.no_grad():
        results = []
        for each in (plain, model):
            cache, found = transformers.DynamicCache(config=each.config), []
            for start, end in ((0, 8), (8, 14), (14, 20)):
                part = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
                found.append(each(LONG[:, start:end], **part).logits)
            results.append(torch.cat(found, 1))
    assert calls(model) == [within] * 2
    assert relative_error(results[1][mask], results[0][mask]) < 1e-3


@pytest.mark.parametrize("changed", [False, True])
def test_a_mask_that_is_changed_in_place_is_looked_at_again(changed: bool) -> None:
    model = upcast.patch(lively())
    rows, count = 5, 3
    mask = torch.ones(1, 1, count, rows + count, dtype=torch.bool).tril(rows)
    with torch.no_grad():
        for _ in range(2):
            cache = transformers.DynamicCache(config=model.config)
            model(LONG[:1, :rows], past_key_values=cache, use_cache=True)
            if changed and calls(model) != [0, 0]:
                mask[..., 2] = False
            model(LONG[:1, rows : rows + count], attention_mask=mask, past_key_values=cache, use_cache=True)
    assert calls(model) == [1 if changed else 2] * 2


ASSISTED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assistant": {},
}


@pytest.mark.parametrize("how", ASSISTED)
def test_drafted_tokens_are_verified_in_one_call_and_change_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, lengths = native.blocks, []
    monkeypatch.setattr(native, "blocks", lambda x, *rest: lengths.append(x.shape[1]) or blocks(x, *rest))
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model = upcast.patch(lively())
    want = model.generate(ids, **options)
    assert {*lengths} == {1}
    draft = {"assistant_model": upcast.patch(lively(num_hidden_layers=1))} if how == "assistant" else ASSISTED[how]
    got = model.generate(ids, **options, **draft)
    assert torch.equal(got, want)
    assert torch.equal(got, rounded(lively()).generate(ids, **options))
    assert max(lengths) > 1


def test_one_token_without_a_cache() -> None:
    ids = torch.tensor([[5]])
    model = upcast.patch(lively())
    with torch.no_grad():
        got, want = (each(ids, use_cache=False).logits for each in (model, rounded(lively())))
    assert calls(model) == [0, 0]
    assert relative_error(got, want) < 1e-5


UNFUSED: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


@pytest.mark.filterwarnings("ignore")  # Transformers' own
@pytest.mark.parametrize("way", UNFUSED)
def test_what_the_call_does_not_cover_runs_module_by_module(way: str) -> None:
    model = upcast.patch(lively())
    got, _ = generated(model, **UNFUSED[way])
    assert calls(model) == [0, 0]
    assert relative_error(got, generated(rounded(lively()), **UNFUSED[way])[0]) < 1e-3


def eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def training(model: Any) -> None:
    model.train()


def hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 2


# Whose layers run as native calls afterwards; where an MLP has a forward of its own, the call goes as far as attention.
LEFT = {eager: (False, False), training: (False, False), hook: (True, False), forward: (True, True)}


@pytest.mark.parametrize("change", LEFT)
def test_what_changes_a_model_is_respected(change: Callable[[Any], None]) -> None:
    want, model = rounded(lively()), upcast.patch(lively())
    generated(model)  # the layers have collected their weights
    for each in (want, model):
        change(each)
    before = calls(model)
    assert relative_error(generated(model)[0], generated(want)[0]) < 1e-3
    native_calls = [calls(model)[layer] - before[layer] for layer in range(2)]
    assert native_calls == [(TOKENS - 1) * left for left in LEFT[change]]


def weight(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.load_state_dict({"weight": torch.ones(16, 32) / 16})


def norm(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1.0


def scaling(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.01


@pytest.mark.parametrize("change", [weight, norm, scaling])
def test_new_numbers_are_seen(change: Callable[[Any], None]) -> None:
    want, model = rounded(lively()), upcast.patch(lively())
    first, _ = generated(model)
    for each in (want, model):
        change(each)
    got, _ = generated(model)
    assert relative_error(got, first) > 1e-2
    assert relative_error(got, generated(want)[0]) < 1e-3
    assert calls(model) == [2 * (TOKENS - 1)] * 2


def test_attentions_and_hidden_states_are_those_of_float32() -> None:
    want, model = rounded(lively(attn_implementation="eager")), upcast.patch(lively(attn_implementation="eager"))
    options = {"output_attentions": True, "output_hidden_states": True}
    kinds = ("attentions", "hidden_states")
    results = []
    for each in (want, model):
        cache = transformers.DynamicCache(config=each.config)
        with torch.inference_mode():
            each(IDS, past_key_values=cache)
            output = each(IDS[:, :1], past_key_values=cache, **options)
        results.append([state for kind in kinds for state in getattr(output, kind)])
    assert len(results[1]) == len(results[0]) == 5
    assert all(relative_error(got, wanted) < 1e-3 for wanted, got in zip(*results, strict=True))


def test_hidden_states_are_those_of_float32() -> None:
    """Transformers records them with hooks on the attentions too, which stay: then it runs module by module."""
    model = upcast.patch(lively())
    results = []
    for each in (rounded(lively()), model):
        cache = transformers.DynamicCache(config=each.config)
        with torch.inference_mode():
            each(IDS, past_key_values=cache)
            results.append(each(IDS[:, :1], past_key_values=cache, output_hidden_states=True).hidden_states)
    assert len(results[1]) == len(results[0]) == 3
    assert all(relative_error(got, want) < 1e-3 for want, got in zip(*results, strict=True))
    assert calls(model) == [0, 0]


def test_a_decoded_value_beyond_float16_widens_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Its row is written nowhere before the layer is upcast: the answer is float32's, with one row of keys each."""
    source = lively()
    with torch.no_grad():
        source.model.embed_tokens.weight[77] = 50.0
        source.model.layers[0].self_attn.v_proj.weight.fill_(60.0)
        source.model.layers[0].input_layernorm.weight.copy_(torch.arange(32.0) * 10)
    results = []
    for each in (rounded(source), upcast.patch(source)):
        cache = transformers.DynamicCache(config=each.config)
        with torch.inference_mode():
            each(IDS, past_key_values=cache)
            results.append(each(torch.full((2, 1), 77), past_key_values=cache).logits)
    assert relative_error(results[1], results[0]) < 1e-3
    assert [type(layer.keys).__name__ for layer in cache.layers] == ["Tensor", "HalfWeight"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8]
    assert calls(source) == [0, 1]
    assert capsys.readouterr().err.count("the KV cache of layer 0 goes to float32") == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_weights_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = upcast.patch(lively())
    before, _ = generated(model)
    other = copied(model)
    weight(model)
    assert torch.equal(generated(other)[0], before)
    assert calls(other)[0] >= TOKENS - 1


def test_layers_of_other_kinds_keep_their_forward() -> None:
    sizes = {**TEXT, "head_dim": 8}
    model = upcast.patch(make("Gemma3ForCausalLM", "Gemma3TextConfig", sizes))
    assert not any(isinstance(module.__dict__.get("forward"), FusedDecoderLayer) for module in model.modules())

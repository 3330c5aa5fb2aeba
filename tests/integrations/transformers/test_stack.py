"""All layers of a model in one native call: that it is one, and everything that must see the layers one by one."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import relative_error, rounded
from tests.integrations.transformers.test_cache import generated
from tests.integrations.transformers.test_layer import KINDS, TOKENS, calls, lively
from tests.transformers_models import IDS
from upcast.integrations.transformers.layer_stack import FusedModel
from upcast.integrations.transformers.versions import cache_name
from upcast.kernels import native

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not native.available() or not native.can_call_blocks(), reason="one block at a time")

TOKEN = IDS[:, :1]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many native calls there were: for one layer, and for all."""
    found = {"block": 0, "blocks": 0}

    def counting(name: str) -> None:
        call = getattr(native, name)

        def counts(*args: Any, **options: Any) -> Any:
            found[name] += 1
            return call(*args, **options)

        monkeypatch.setattr(native, name, counts)

    counting("block")
    counting("blocks")
    return found


def filled(model: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    return cache


def step(model: Any, cache: Any, token: torch.Tensor = TOKEN, **options: Any) -> Any:
    with torch.no_grad():
        return model(token, past_key_values=cache, use_cache=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_one_call(kind: str, counted: dict[str, int]) -> None:
    want, _ = generated(rounded(lively(kind)))
    model = upcast.patch(lively(kind))
    got, _ = generated(model)
    assert counted == {"block": 0, "blocks": TOKENS - 1}
    assert calls(model) == [TOKENS - 1] * 2
    assert relative_error(got, want) < 1e-3


@pytest.mark.parametrize("rows", [1, 2])
def test_few_positions_are_one_call_and_many_one_per_layer(rows: int, counted: dict[str, int]) -> None:
    model = upcast.patch(lively())
    for count in (8, 9, 16, 17):
        counted |= {"block": 0, "blocks": 0}
        cache = transformers.DynamicCache(config=model.config)
        step(model, cache, IDS[:rows])
        step(model, cache, torch.full((rows, count), 9))
        assert counted == ({"block": 0, "blocks": 1} if rows * count <= 16 else {"block": 2, "blocks": 0})


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_a_padded_batch_is_one_call(kind: str, counted: dict[str, int]) -> None:
    want, _ = generated(rounded(lively(kind)), attention_mask=PADDED)
    got, _ = generated(upcast.patch(lively(kind)), attention_mask=PADDED)
    assert counted == {"block": 0, "blocks": TOKENS - 1}
    assert relative_error(got, want) < 1e-3


# --- who looks between two layers -------------------------------------------------------------------------------------


def a_hook(model: Any) -> Any:
    seen: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


def a_pre_hook(model: Any) -> Any:
    seen: list[Any] = []
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


def a_hook_on_a_linear(model: Any) -> Any:
    seen: list[Any] = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    return seen


def a_hook_on_all(model: Any) -> Any:
    seen: list[Any] = []
    layer = model.model.layers[1]
    kept = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if module is layer else None
    )
    seen.append(kept)
    return seen


@pytest.mark.parametrize("watch", [a_hook, a_pre_hook, a_hook_on_a_linear, a_hook_on_all])
def test_who_watches_a_layer_sees_what_it_gives(watch: Callable[[Any], Any]) -> None:
    plain, model = rounded(lively()), upcast.patch(lively())
    caches = [filled(each) for each in (plain, model)]
    step(model, copy.deepcopy(caches[1]))  # as one call, before anybody watches
    seen = []
    for each, cache in zip((plain, model), caches, strict=True):
        found = watch(each)
        step(each, cache)
        if watch is a_hook_on_all:
            found.pop(0).remove()
        assert len(found) == 1
        seen += found
    assert relative_error(seen[1], seen[0]) < 1e-3


def fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def another_order(model: Any) -> None:
    model.model.layers = nn.ModuleList([*model.model.layers][::-1])


def a_layer_that_does_nothing(model: Any) -> None:
    model.model.layers[0].forward = lambda x, **_: x


def one_layer_twice(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


@pytest.mark.parametrize("change", [fewer_layers, another_order, a_layer_that_does_nothing, one_layer_twice])
def test_a_model_that_runs_other_layers(change: Callable[[Any], None]) -> None:
    results = []
    for each in (rounded(lively()), upcast.patch(lively())):
        cache = filled(each)
        step(each, cache)
        change(each)
        results.append(step(each, filled(each)).logits)
    assert relative_error(results[1], results[0]) < 1e-3


def adds_between(self: Any, input_ids: Any, **given: Any) -> Any:
    """A forward of the user's: what it adds between two layers must count."""
    x, cache = self.embed_tokens(input_ids), given[cache_name()]
    positions = torch.arange(x.shape[1])[None] + cache.get_seq_length()
    angles = self.rotary_emb(x, position_ids=positions)
    for layer in self.layers:
        x = 1.5 * layer(x, attention_mask=None, position_embeddings=angles, **{cache_name(): cache})
    return transformers.modeling_outputs.BaseModelOutputWithPast(self.norm(x), cache)


@pytest.mark.parametrize("when", ["before the patch", "after it"])
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_forward_of_the_users_has_its_layers_one_by_one(
    where: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = rounded(lively()), lively()

    def change(each: Any) -> None:
        if where == "class":
            monkeypatch.setattr(type(each.model), "forward", adds_between)
        else:
            each.model.forward = adds_between.__get__(each.model)

    if when == "before the patch":
        change(model)
    upcast.patch(model)
    filled(model)
    change(plain)
    change(model)
    got, want = (step(each, filled(each)).logits for each in (model, plain))
    assert relative_error(got, want) < 1e-3
    assert calls(model) == [1, 1]  # one native call each


def test_layers_that_the_program_calls_itself() -> None:
    plain, model = rounded(lively()), upcast.patch(lively())
    results = []
    for each in (plain, model):
        cache = filled(each)
        x = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
        angles = each.model.rotary_emb(x, position_ids=torch.tensor([[7]]))
        with torch.no_grad():
            for layer in each.model.layers:
                x = layer(x, attention_mask=None, position_embeddings=angles, **{cache_name(): cache})
                results.append(x)
    assert relative_error(results[2], results[0]) < 1e-3
    assert relative_error(results[3], results[1]) < 1e-3


# --- the cache, whose rows are handed out only when somebody asks -----------------------------------------------------


def looks(layer: Any) -> None:
    assert layer.keys.shape == layer.values.shape == (2, 2, layer.get_seq_length(), 8)


def copies(layer: Any) -> None:
    copy.copy(layer).update(*(torch.ones(2, 2, 1, 8) for _ in range(2)))


def assigns(layer: Any) -> None:
    layer.keys = layer.keys * 1.0


def only_keys(layer: Any) -> None:
    layer.__dict__["keys"] = torch.cat([layer.__dict__.get("keys", layer.keys)] * 1)


def crops(layer: Any) -> None:
    layer.crop(6 - layer.get_seq_length())  # the one way that all versions have: how many to take away


def repeats(layer: Any) -> None:
    layer.batch_select_indices(torch.tensor([1, 0]))


def nothing(layer: Any) -> None:
    pass


@pytest.mark.parametrize("between", [nothing, looks, copies, assigns, only_keys, crops, repeats])
def test_what_is_done_to_a_cache_between_tokens(between: Callable[[Any], None]) -> None:
    results = []
    for each in (rounded(lively()), upcast.patch(lively())):
        cache, found = filled(each), []
        for _ in range(3):
            found.append(step(each, cache).logits)
            for layer in cache.layers:
                between(layer)
        results.append(torch.cat(found))
        assert cache.get_seq_length() == (6 if between is crops else 10)
    assert relative_error(results[1], results[0]) < 1e-3


def test_two_copies_of_a_cache_go_their_own_ways() -> None:
    model = upcast.patch(lively())
    cache = filled(model)
    step(model, cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    tokens = [torch.full((2, 1), token) for token in (11, 22, 33)]
    mixed = [[], []]
    for token in tokens:
        mixed[0].append(step(model, cache, token).logits)
        mixed[1].append(step(model, other, token + 50).logits)
    for add, got in zip((0, 50), mixed, strict=True):
        alone = filled(model)
        step(model, alone)
        assert torch.equal(torch.cat(got), torch.cat([step(model, alone, token + add).logits for token in tokens]))


def test_a_layer_in_the_middle_that_goes_to_float32() -> None:
    source = lively(num_hidden_layers=4)
    with torch.no_grad():
        source.model.embed_tokens.weight[77] = 50.0
        source.model.layers[2].self_attn.v_proj.weight.fill_(60.0)
        source.model.layers[2].input_layernorm.weight.copy_(torch.arange(32.0) * 10)
    results = []
    for each in (rounded(source), upcast.patch(source)):
        cache = filled(each)
        found = [step(each, cache, torch.full((2, 1), token)).logits for token in (5, 77, 6)]
        results.append(torch.cat(found))
    assert relative_error(results[1], results[0]) < 1e-3
    assert [type(layer.keys).__name__ for layer in cache.layers] == ["HalfWeight", "HalfWeight", "Tensor", "HalfWeight"]
    assert [layer.get_seq_length() for layer in cache.layers] == [10] * 4


def test_a_guard_goes_back_to_the_rows_before_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    model = upcast.patch(lively(), guard=True)
    cache = filled(model)
    step(model, cache)
    held = model.model.layers[1].mlp.down_proj.weight
    held.data.fill_(float("inf"))
    with pytest.raises(upcast.UpcastError, match="not finite"):
        step(model, cache)
    assert cache.get_seq_length() == 8
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8]


def test_threads_have_each_their_own_run() -> None:
    model = upcast.patch(lively())
    want = {token: generated_from(model, token) for token in (7, 9)}
    got: dict[int, list[torch.Tensor]] = {7: [], 9: []}
    threads = [threading.Thread(target=lambda t=token: got[t].extend(generated_from(model, t))) for token in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(torch.cat(got[token]), torch.cat(want[token])) for token in got)


def generated_from(model: Any, token: int) -> list[torch.Tensor]:
    cache = filled(model)
    return [step(model, cache, torch.full((2, 1), token + i)).logits for i in range(20)]


def test_unpatching_takes_it_away() -> None:
    model = upcast.patch(lively())
    assert isinstance(model.model.__dict__["forward"], FusedModel)
    upcast.unpatch(model)
    assert "forward" not in model.model.__dict__

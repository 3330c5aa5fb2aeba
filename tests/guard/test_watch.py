"""guard and heal: the first module and operation are named, and a healed step leaves no trace but its policy."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import upcast
from tests.conftest import assert_patched
from tests.litgpt_checkpoints import small_config
from tests.models import IDS as NET_IDS
from tests.models import Net, snapshot
from tests.planted import IDS, Planted, build, plant
from upcast import UpcastError
from upcast.guard.forward import GuardedForward, State
from upcast.policy.policy import CLASSES, Policy
from upcast.tensor.half_weight import HalfWeight

LATE = 11  # the position from which the planted operation overflows


class Late(Planted):
    """A planted operation that overflows only once it has seen LATE positions."""

    seen = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        self.seen = self.positions()
        if self.seen < LATE:
            return out
        return out + (self.operation(out, self) * 0.0).mean()


def late(family: str, op_class: str) -> tuple[nn.Module, Late]:
    """Return a model in whose second block an operation overflows from position LATE on."""
    model = build(family, 3)
    names = [n for n, m in model.named_modules() if ".1." in n and type(m) is nn.Linear]
    parent, _, leaf = names[-1].rpartition(".")
    inner = model.get_submodule(names[-1])
    planted = Late(inner, op_class, inner.out_features)
    setattr(model.get_submodule(parent), leaf, planted)
    return model, planted


def litgpt_tokens(model: Any, count: int = 12) -> list[int]:
    """Generate greedily with LitGPT's own loop; the planted operation is told the position."""
    from litgpt.generate.base import generate

    planted = next(m for m in model.modules() if isinstance(m, Late))
    position = [0]
    planted.positions = lambda: position[0]
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: position.__setitem__(0, int(kwargs.get("input_pos", args[-1]).max())),
        with_kwargs=True,
    )
    with torch.inference_mode():
        model.set_kv_cache(batch_size=1, max_seq_length=32)
        tokens = generate(model, IDS[0, :6], max_returned_tokens=6 + count, temperature=0.0, include_prompt=False)
        model.clear_kv_cache()
    handle.remove()
    del planted.positions
    return tokens.tolist()


@pytest.mark.parametrize("op_class", CLASSES)
def test_a_planted_overflow_in_mid_generation_is_healed(op_class: str, capsys: Any) -> None:
    model, _ = late("Llama-3.2-1B", op_class)
    want = litgpt_tokens(copy.deepcopy(model))
    policy = Policy(frozenset(CLASSES) - {op_class})
    healed = upcast.patch(copy.deepcopy(model), policy=policy, heal=True)
    assert_patched(healed)
    capsys.readouterr()
    assert litgpt_tokens(healed) == want
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert f"from this step on {op_class} runs in float32 too" in said[0]
    assert upcast.patching.engine.record_of(healed).policy == Policy()
    plain = upcast.patch(copy.deepcopy(model), policy=policy)
    planted = next(m for m in plain.modules() if isinstance(m, Late))
    planted.positions = lambda: LATE
    assert bool(plain(IDS)[0].isnan().all())


def transformers_tokens(model: Any) -> list[int]:
    planted = next(m for m in model.modules() if isinstance(m, Late))
    length = [0]
    planted.positions = lambda: length[0]
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: length.__setitem__(0, length[0] + kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    tokens = model.generate(IDS[:, :6], pad_token_id=0, eos_token_id=None, **options)
    handle.remove()
    del planted.positions
    return tokens.tolist()


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_a_growing_cache_is_as_if_it_had_never_happened(family: str, capsys: Any) -> None:
    model, _ = late(family, "residual")
    want = transformers_tokens(copy.deepcopy(model))
    healed = upcast.patch(model, policy="linear+norm+softmax+scores+activation", heal=True)
    capsys.readouterr()
    assert transformers_tokens(healed) == want
    assert capsys.readouterr().err.count("from this step on residual runs in float32") == 1


def test_healing_a_step_leaves_the_cache_as_the_wider_policy_makes_it() -> None:
    from litgpt import GPT

    model = GPT(small_config("Llama-3.2-1B")).eval()
    with torch.no_grad():
        model.transformer.h[1].mlp.proj.weight.mul_(3e5)
    healed = upcast.patch(copy.deepcopy(model), policy="scores", heal=True)
    with torch.inference_mode():
        healed.set_kv_cache(1, 16)
        got = [healed(IDS[:, :5], torch.arange(5)), healed(IDS[:, 5:6], torch.tensor([5]))]
        policy = upcast.patching.engine.record_of(healed).policy
        assert policy.classes > {"scores"}
        other = upcast.patch(copy.deepcopy(model), policy=policy)
        other.set_kv_cache(1, 16)
        want = [other(IDS[:, :5], torch.arange(5)), other(IDS[:, 5:6], torch.tensor([5]))]
    for one, two in zip(healed.transformer.h, other.transformer.h, strict=True):
        assert torch.equal(one.attn.kv_cache.k, two.attn.kv_cache.k)
        assert torch.equal(one.attn.kv_cache.v, two.attn.kv_cache.v)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Recurrent(nn.Module):
    """A state that the step changes in place: a repeated step must not change it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(8) * 1e4)

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        state["sum"] += x.to(state["sum"].dtype)
        return self.linear(x) * 1e-4 + state["sum"].to(x.dtype)


def test_state_in_place_is_restored() -> None:
    state = {"sum": torch.zeros(1, 8)}
    model = upcast.patch(Recurrent(), policy="none", heal=True)
    with torch.no_grad():
        got = model(torch.full((1, 8), 10.0), state)
    assert torch.equal(state["sum"], torch.full((1, 8), 10.0))
    assert torch.equal(got, torch.full((1, 8), 20.0))


@pytest.mark.parametrize("seed", range(0, 12, 2))
@pytest.mark.parametrize("policy", ["none", "all but it"])
def test_guard_names_the_first_module_and_operation(seed: int, policy: str) -> None:
    fault = plant(seed)
    chosen = Policy(frozenset(CLASSES) - {fault.op_class}) if policy != "none" else policy
    model = upcast.patch(fault.model, policy=chosen, guard=True)
    with pytest.raises(UpcastError, match="the result is not finite under policy") as caught, torch.no_grad():
        model(IDS)
    assert f"first in {fault.module}: " in str(caught.value)


def test_guard_under_safe_names_what_is_not_finite_in_float32_too() -> None:
    from litgpt import GPT

    model = upcast.patch(GPT(small_config("Llama-3.2-1B")).eval(), guard=True)
    fused = model.__dict__["forward"].below
    with torch.inference_mode():
        model(IDS)
        assert fused.calls == 1
        model.transformer.h[2].norm_1.weight[3] = float("nan")
        with pytest.raises(UpcastError, match=r"in float32 it is not either, first in transformer\.h\.2\.norm_1: norm"):
            model(IDS)
        with pytest.raises(UpcastError):
            model(IDS)
    assert model.__dict__["forward"].below is fused


def test_infinite_logits_that_are_meant_are_left_alone() -> None:
    class Masked(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).index_fill(-1, torch.tensor([3]), -torch.inf)

    for policy in ("safe", "none"):
        model = upcast.patch(Masked(), policy=policy, guard=True, heal=True)
        with torch.no_grad():
            assert bool(model(NET_IDS)[..., 3].isinf().all())
            assert bool(model(NET_IDS)[..., 3].isinf().all())
        assert str(upcast.patching.engine.record_of(model).policy) == policy


@pytest.mark.parametrize("policy", ["safe", "none"])
def test_watching_changes_no_bit_and_leaves_no_trace(policy: str) -> None:
    model = Net()
    before = snapshot(model)
    want = upcast.patch(copy.deepcopy(model), policy=policy)(NET_IDS)
    upcast.patch(model, policy=policy, guard=True, heal=True)
    assert isinstance(model.__dict__["forward"], GuardedForward)
    assert torch.equal(model(NET_IDS), want)
    assert torch.equal(copy.deepcopy(model)(NET_IDS), want)
    upcast.unpatch(model)
    after = snapshot(model)
    assert {name: set(d) for name, (_, d) in after.items()} == {name: set(d) for name, (_, d) in before.items()}


def test_heal_under_safe_is_nothing() -> None:
    assert "forward" not in upcast.patch(Net(), heal=True).__dict__


def test_diagnosis_of_a_watched_model_is_not_watched() -> None:
    fault = plant(0)
    model = upcast.patch(fault.model, policy="none", guard=True)
    found = upcast.diagnose(model, IDS)
    assert found.culprit is not None
    assert found.culprit.module == fault.module


# --- Transformers' cache in float16 -----------------------------------------------------------------------------------


class Copied(TorchDispatchMode):
    """Counts the bytes that are copied."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy"):
            self.count += result.nbytes
        return result


def through_cache(prefix: Any, model: Any, cache: Any, bad: int | None = None) -> Tensor:
    """Return the logits of a prompt and of the tokens after it; at position ``bad`` the planted operation overflows."""
    for each in (prefix, model):
        next(m for m in each.modules() if isinstance(m, Late)).positions = lambda: 0
    planted = next(m for m in model.modules() if isinstance(m, Late))
    logits = []
    with torch.no_grad():
        for start, end in [(0, 6), *((t, t + 1) for t in range(6, 12))]:
            planted.positions = lambda start=start: LATE if start == bad else 0
            step = prefix if start == 0 else model
            ids, where = IDS[:, start:end], torch.arange(start, end)
            logits.append(step(ids, past_key_values=cache, cache_position=where).logits.float())
    return torch.cat(logits, 1)


def caches(config: Any) -> list[Any]:
    from transformers import DynamicCache, StaticCache

    return [DynamicCache(), StaticCache(config=config, max_cache_len=16)]


@pytest.mark.parametrize("which", [0, 1], ids=["growing", "static"])
def test_watching_copies_nothing_of_a_float16_cache(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = upcast.patch(late("LlamaForCausalLM", "residual")[0], guard=True)
    counter = Copied()
    taken: list[int] = []
    take = State.__init__

    def counted(self: State, *args: Any) -> None:
        with counter:
            take(self, *args)
        taken.append(sum(len(fields) for _, fields in self._objects))

    monkeypatch.setattr(State, "__init__", counted)
    cache = caches(model.config)[which]
    through_cache(model, model, cache)
    assert isinstance(cache.layers[0].keys, HalfWeight)
    assert len(taken) == 7
    assert taken[-1] > 10  # the layers' fields are remembered
    assert counter.count == 0


@pytest.mark.parametrize("which", [0, 1], ids=["growing", "static"])
def test_healing_with_a_float16_cache_gives_what_float32_gives(which: int, capsys: Any) -> None:
    model, _ = late("LlamaForCausalLM", "residual")
    safe = upcast.patch(copy.deepcopy(model))
    want = through_cache(safe, safe, caches(model.config)[which])
    healed = upcast.patch(copy.deepcopy(model), policy="linear+norm+softmax+scores+activation", heal=True)
    cache = caches(model.config)[which]
    capsys.readouterr()
    got = through_cache(safe, healed, cache, bad=8)
    assert capsys.readouterr().err.count("from this step on residual runs in float32") == 1
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert float((got - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("which", [0, 1], ids=["growing", "static"])
def test_after_an_error_the_cache_is_as_if_the_step_had_never_been(which: int) -> None:
    """Also where the step made a layer of the cache give up float16."""
    model, _ = late("LlamaForCausalLM", "residual")
    safe = upcast.patch(model, guard=True)
    want = through_cache(safe, safe, caches(model.config)[which])
    cache = caches(model.config)[which]
    norm = model.model.layers[0].input_layernorm.weight
    fine = norm.detach().clone()
    planted = next(m for m in model.modules() if isinstance(m, Late))
    planted.positions = lambda: 0
    logits = []
    with torch.no_grad():
        for start, end in [(0, 6), *((t, t + 1) for t in range(6, 12))]:
            ids, where = IDS[:, start:end], torch.arange(start, end)
            if start == 8:
                before = [(type(layer), layer.get_seq_length(), layer.keys.stored.clone()) for layer in cache.layers]
                norm.copy_(fine * 1e30)  # beyond 65504: the first layer's cache gives up float16; then infinite
                with pytest.raises(UpcastError, match="not finite"):
                    safe(ids, past_key_values=cache, cache_position=where)
                norm.copy_(fine)
                for layer, (kind, length, keys) in zip(cache.layers, before, strict=True):
                    assert type(layer) is kind
                    if which == 0:
                        assert layer.get_seq_length() == length
                    assert torch.equal(layer.keys.stored[:, :, :8], keys[:, :, :8])
            logits.append(safe(ids, past_key_values=cache, cache_position=where).logits)
    assert torch.equal(torch.cat(logits, 1), want)


def test_a_window_that_moves_along_in_place_is_put_back() -> None:
    from transformers.cache_utils import StaticSlidingWindowLayer

    layer = StaticSlidingWindowLayer(max_cache_len=4, sliding_window=4)
    rows = torch.arange(8.0).view(1, 1, 8, 1)
    for t in range(6):
        layer.update(rows[:, :, t : t + 1], rows[:, :, t : t + 1], {"cache_position": torch.tensor([t])})
    held = layer.keys.clone()
    state = State((), {"layer": layer}, nn.Module())
    layer.update(rows[:, :, 6:7], rows[:, :, 6:7], {"cache_position": torch.tensor([6])})
    assert not torch.equal(layer.keys, held)
    state.restore()
    assert torch.equal(layer.keys, held)
    assert layer.cumulative_length == 6

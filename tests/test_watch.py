"""guard and heal: the first module and operation are named, and a healed step leaves no trace but its policy."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched
from tests.litgpt_checkpoints import small_config
from tests.planted import IDS, Planted, build, plant
from tests.test_patching import IDS as NET_IDS
from tests.test_patching import Net, snapshot
from upcast import UpcastError
from upcast.policy import CLASSES, Policy
from upcast.watch import Watch

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
    assert upcast.patching.record_of(healed).policy == Policy()
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
        policy = upcast.patching.record_of(healed).policy
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
    fused = model.__dict__["forward"].before
    with torch.inference_mode():
        model(IDS)
        assert fused.calls == 1
        model.transformer.h[2].norm_1.weight[3] = float("nan")
        with pytest.raises(UpcastError, match=r"in float32 it is not either, first in transformer\.h\.2\.norm_1: norm"):
            model(IDS)
        with pytest.raises(UpcastError):
            model(IDS)
    assert model.__dict__["forward"].before is fused


def test_infinite_logits_that_are_meant_are_left_alone() -> None:
    class Masked(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).index_fill(-1, torch.tensor([3]), -torch.inf)

    for policy in ("safe", "none"):
        model = upcast.patch(Masked(), policy=policy, guard=True, heal=True)
        with torch.no_grad():
            assert bool(model(NET_IDS)[..., 3].isinf().all())
            assert bool(model(NET_IDS)[..., 3].isinf().all())
        assert str(upcast.patching.record_of(model).policy) == policy


@pytest.mark.parametrize("policy", ["safe", "none"])
def test_watching_changes_no_bit_and_leaves_no_trace(policy: str) -> None:
    model = Net()
    before = snapshot(model)
    want = upcast.patch(copy.deepcopy(model), policy=policy)(NET_IDS)
    upcast.patch(model, policy=policy, guard=True, heal=True)
    assert isinstance(model.__dict__["forward"], Watch)
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

"""Policies touch the patched model and nothing else: not other models, other threads, or what comes after."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, half_weights
from tests.models import IDS, Net, snapshot
from upcast.policy import module_scope
from upcast.policy.policy import Policy


@pytest.mark.parametrize("policy", ["none", "sensitive", "norm; up=linear"])
def test_patch_then_unpatch_leaves_no_trace(policy: str) -> None:
    model = Net()
    before = snapshot(model)
    upcast.patch(model, policy=policy)
    assert_patched(model)
    model(IDS)
    upcast.unpatch(model)
    after = snapshot(model)
    assert {name: (kind, set(d)) for name, (kind, d) in after.items()} == {
        name: (kind, set(d)) for name, (kind, d) in before.items()
    }
    tensors = [*model.parameters(), *model.buffers()]
    assert all("_upcast" not in tensor.__dict__ for tensor in tensors)


def test_patched_restores_the_original_tensors() -> None:
    model = Net()
    before, parameters = snapshot(model), dict(model.named_parameters())
    with upcast.patched(model, policy="sensitive"):
        model(IDS)
    assert snapshot(model) == before
    assert all(p is parameters[name] and "_upcast" not in p.__dict__ for name, p in model.named_parameters())


def test_other_models_and_other_threads_are_untouched() -> None:
    model, other = upcast.patch(Net(), policy="none"), Net()
    want, inside, failures = other(IDS), threading.Event(), []

    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            thread.join(timeout=60)
            return x

    def elsewhere() -> None:
        inside.wait(timeout=60)
        if not torch.equal(other(IDS), want) or other(IDS).dtype != torch.float32:
            failures.append("another thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    model.down.register_forward_hook(lambda module, args, out: Waiting()(out))
    assert model(IDS).dtype == torch.float16
    assert not thread.is_alive()
    assert not failures
    assert torch.equal(other(IDS), want)
    assert torch.equal(torch.add(torch.ones(1).half(), 1), torch.full((1,), 2).half())


@pytest.mark.parametrize("inner_policy", ["safe", "sensitive", "none"])
@pytest.mark.parametrize("outer_policy", ["none", "residual+linear"])
def test_nested_models_keep_their_policies(inner_policy: str, outer_policy: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(129, 4)

        def forward(self, ids: Tensor) -> Tensor:
            self.between = self.inner(ids)
            return self.last(self.between + torch.zeros_like(self.between))

    inner = Net()
    want = upcast.patch(copy.deepcopy(inner), policy=inner_policy)(IDS)
    outer = upcast.patch(Outer(), policy=outer_policy)
    outer.inner = upcast.patch(inner, policy=inner_policy)
    outer(IDS)
    assert outer.between.dtype == want.dtype
    assert torch.equal(outer.between, want)


def test_threads_with_different_policies_at_once() -> None:
    models = [upcast.patch(copy.deepcopy(Net()), policy=policy) for policy in ("none", "sensitive", "safe")]
    want = [model(IDS) for model in models]
    failures = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.equal(models[index](IDS), want[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_under_the_same_policy(copied: Any) -> None:
    model = upcast.patch(Net(), policy="norm+linear")
    want = model(IDS)
    other = copied(model)
    assert torch.equal(other(IDS), want)
    assert half_weights(other).keys() == half_weights(model).keys()
    module_scope.change(other, other.__dict__["forward"].selection, Policy(frozenset()))
    assert not torch.equal(other(IDS).float(), want)
    assert torch.equal(model(IDS), want)
    upcast.unpatch(other)


def test_a_module_inside_can_be_called_by_itself() -> None:
    model = upcast.patch(Net(), policy="none")
    x = torch.randn(3, 32)
    assert model.up(x).dtype == torch.float16
    assert x.dtype == torch.float32
    assert "_upcast" not in x.__dict__


def test_gradients_flow_through() -> None:
    model = upcast.patch(Net(), policy="sensitive")
    x = torch.randn(2, 5, 32, requires_grad=True)
    model.up(model.norm(x)).float().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())

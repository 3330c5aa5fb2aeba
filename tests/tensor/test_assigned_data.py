"""`weight.data = x`, where something else holds x.

In a model that was in half precision the weight is stored in float16 again when only a local variable held x; what
stays held is shared. A float32 model keeps all digits.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from tests.tensor.test_memory import X, net
from upcast.tensor.half_weight import HalfWeight


def merged(weight: Any) -> None:
    """As adapters are merged with a check: a copy, held by a local variable until the function returns."""
    changed = weight.data.clone()
    changed += torch.full_like(changed, 0.5, requires_grad=True)
    assert changed.isfinite().all()
    weight.data = changed


# a layer whose model was in half precision, and its input
HALVED: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(5, 7), (2, 5)),
    (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 7, 5)),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5)),
    (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 7)),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 3, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("make", "shape"), HALVED)
def test_what_a_local_variable_held_goes_back_to_float16(
    make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype).eval()
    plain = copy.deepcopy(model).float()
    upcast.patch(model)
    for each in (model, plain):
        for p in each.parameters():
            if p.dim() > 1:
                merged(p)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(p.half().float() if p.dim() > 1 else p)
        assert relative_error(model(x), plain(x.float())) < 1e-5
    assert_patched(model)
    assert not any(weight.fallbacks.dissolved for weight in half_weights(model).values())
    assert all(value.dtype == torch.float16 for value in model.state_dict().values() if value.dim() > 1)


def test_a_float32_model_keeps_all_digits_of_a_merge() -> None:
    model, plain = upcast.patch(net()), rounded(net())
    for each in (model, plain):
        merged(each[0].weight)
    assert torch.equal(model[0].weight, plain[0].weight)


AFTER: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda m: m[0].load_state_dict(m.state_dict(), strict=False),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "unpatch": upcast.unpatch,
    "report": upcast.report,
}


@pytest.mark.parametrize("after", AFTER)
def test_what_is_done_right_after_such_an_assignment(after: str) -> None:
    model, plain = upcast.patch(net().half()), net().half().float()
    for each in (model, plain):
        merged(each[0].weight)
    other = AFTER[after](model)
    other = other if isinstance(other, nn.Sequential) else model
    assert isinstance(other[0].weight, HalfWeight) == (after != "unpatch")
    assert relative_error(other.float()(X), plain(X)) < 1e-3
    assert torch.allclose(other[0].weight, plain[0].weight, rtol=1e-3, atol=1e-4)


def test_what_stays_held_is_shared_for_good() -> None:
    model, plain = upcast.patch(net().half()), net().half().float()
    for each in (model, plain):
        view = each[0].weight.data[:2]
        each[0].weight.data = held = torch.ones(40, 5)
        held[3:] = 2.0
        view.fill_(5.0)  # the old memory
        assert each[0].weight.sum() == 3 * 5 + 37 * 5 * 2
        each[0].weight.data[0] = 7.0
        assert held[0, 0] == 7.0
    assert type(model[0].weight) is nn.Parameter
    assert relative_error(model(X), plain(X)) < 1e-5


ELSEWHERE: dict[str, Callable[[Any], torch.Tensor]] = {
    "numpy": torch.from_numpy,
    "dlpack": torch.from_dlpack,
    "buffer": lambda array: torch.frombuffer(array, dtype=torch.float32).view(40, 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_memory_that_torch_did_not_allocate_stays_shared(kind: str, dtype: torch.dtype) -> None:
    """Torch does not know who else holds it."""
    model, plain = upcast.patch(net().to(dtype)), net().to(dtype).float()
    for each in (model, plain):
        array = np.ones((40, 5), np.float32)
        each[0].weight.data = ELSEWHERE[kind](array)
        each(X.to(each[2].weight.dtype))
        array[3:] = 2.0
    assert torch.equal(model[0].weight, plain[0].weight)
    assert half_weights(model)  # the others


def lifted(weight: Any) -> None:
    changed = weight.data.clone()
    changed[1, 1] = 1e5
    weight.data = changed


def averaged(weight: Any) -> None:
    for _ in range(20):
        step = weight.data.clone()
        step.mul_(0.9999).add_(torch.ones_like(step), alpha=0.0001)
        weight.data = step


@pytest.mark.parametrize("assign", [lifted, averaged])
def test_what_float16_would_lose_becomes_float32(assign: Callable[[Any], None]) -> None:
    model, plain = upcast.patch(net().half()), net().half().float()
    for each in (model, plain):
        assign(each[0].weight)
    assert relative_error(model(X), plain(X)) < 1e-3
    assert type(model[0].weight) is nn.Parameter
    assert relative_error(model[0].weight, plain[0].weight) < 1e-4

"""nn.TransformerEncoder under padding masks: what torch leaves at padded positions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import half_weights, relative_error, rounded

OFF = -torch.inf
LEFT_ALIGNED = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()
MASKS: dict[str, Tensor] = {
    "booleans": LEFT_ALIGNED,
    "holes": torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool(),
    "minus infinity": torch.zeros(3, 5).masked_fill(LEFT_ALIGNED, OFF),
    "large floats": torch.zeros(3, 5).masked_fill(LEFT_ALIGNED, -1e4),
}


def as_it_is(encoder: Any, layer: nn.Module) -> None:
    pass


def first_replaced(encoder: Any, layer: nn.Module) -> None:
    encoder.layers[0] = layer


def all_replaced(encoder: Any, layer: nn.Module) -> None:
    encoder.layers = nn.ModuleList([layer, copy.deepcopy(layer)])


def turned_off(encoder: Any, layer: nn.Module) -> None:
    encoder.use_nested_tensor = False


CHANGES: list[Callable[[Any, nn.Module], None]] = [as_it_is, first_replaced, all_replaced, turned_off]


def layer() -> nn.Module:
    return rounded(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval())


def pair() -> tuple[Any, Any]:
    model = nn.TransformerEncoder(layer(), 2, nn.LayerNorm(16)).eval()  # type: ignore[arg-type]
    plain = rounded(model)
    upcast.patch(model)
    assert half_weights(model)
    return plain, model


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("mask", MASKS)
def test_padded_positions_are_torchs(mask: str, change: Callable[[Any, nn.Module], None]) -> None:
    plain, model = pair()
    new = layer()
    change(plain, new)
    change(model, copy.deepcopy(new))
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        want, got = (each(x, src_key_padding_mask=MASKS[mask]) for each in (plain, model))
        assert torch.equal(got.isnan(), want.isnan())
        assert relative_error(got.nan_to_num(), want.nan_to_num()) < 1e-5
        by_position = model(x, None, MASKS[mask])
    assert torch.equal(by_position.nan_to_num(), got.nan_to_num())


def test_unpatched_it_is_as_before() -> None:
    plain, model = pair()
    upcast.unpatch(model)
    assert model.use_nested_tensor is plain.use_nested_tensor is True
    assert not model._forward_hooks

"""Recurrent layers of a patched model."""

from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import fallbacks, relative_error, rounded

pytestmark = pytest.mark.usefixtures("each_kernels")


def test_recurrent_layers_use_the_new_weights() -> None:
    model = nn.LSTM(7, 33).eval()
    x = torch.randn(5, 2, 7)
    want = rounded(model)(x)[0]
    upcast.patch(model)
    used = zip(model._flat_weights_names, model._flat_weights, strict=True)
    assert all(weight is getattr(model, name) for name, weight in used)
    assert relative_error(model(x)[0], want) < 1e-6
    assert fallbacks(model).calls == {}


RECURRENT = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"proj_size": 5}),
    (nn.LSTM, {"bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.RNN, {"bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "settings"), RECURRENT)
def test_recurrent_layers_take_packed_sequences(kind: Any, settings: dict[str, Any]) -> None:
    model = kind(7, 33, batch_first=True, **settings)
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(3, 6, 7), torch.tensor([2, 6, 4]), batch_first=True, enforce_sorted=False
    )
    want, want_state = rounded(model)(packed)
    got, state = upcast.patch(model)(packed)
    assert torch.equal(got.batch_sizes, want.batch_sizes)
    assert relative_error(got.data, want.data) < 1e-6
    for one, other in zip(_states(state), _states(want_state), strict=True):
        assert relative_error(one, other) < 1e-6
    assert fallbacks(model).calls == {}


def _states(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)

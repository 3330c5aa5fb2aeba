"""Ordinary things that programs do to a model, whose recurrent layers list their weights twice more."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights, relative_error, rounded


class Tagger(nn.Module):
    """A recurrent layer inside a model, as they come: nested, with other weights beside it."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(11, 7), nn.ModuleDict({"layer": layer})
        self.head = nn.Linear(7, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.body["layer"](self.words(ids))
        return self.head(states)  # type: ignore[no-any-return]


IDS = torch.arange(10).view(2, 5)
ORDINARY: dict[str, Callable[[nn.Module], Any]] = {
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.device("cpu"), torch.float32),
    "share_memory": lambda m: m.requires_grad_(False).share_memory(),
    "of the layer": lambda m: m.body["layer"].cpu(),
    "doubled": lambda m: m._apply(lambda t: t * 2),
    "emptied and loaded": lambda m: [
        state := copy.deepcopy(m.state_dict()),
        m.to_empty(device="cpu"),
        m.load_state_dict(state),
    ],
    "copied": lambda m: setattr(m, "body", copy.deepcopy(m.body)),
    "pickled": lambda m: setattr(m, "body", pickle.loads(pickle.dumps(m.body))),
    "flattened": lambda m: m.body["layer"].flatten_parameters(),
    "compiled": lambda m: setattr(m, "body", nn.ModuleDict({"layer": torch.compile(m.body["layer"], backend="eager")})),
    "exported": lambda m: torch.export.export(m, (IDS,), strict=False),
}


LONG = ("compiled", "exported")


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, of the unpatched model too
@pytest.mark.parametrize(
    ("kind", "ordinary"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] if name in LONG and kind is not nn.LSTM else [])
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for name in ORDINARY
    ],
)
def test_what_is_done_to_a_model_leaves_its_recurrent_layers_whole(kind: Any, ordinary: str) -> None:
    model = Tagger(kind(7, 7, batch_first=True)).eval()
    model, plain = copy.deepcopy(model), rounded(model)  # whose layer refers to weights of the copy
    upcast.patch(model)
    with torch.no_grad():
        for each in (plain, model):
            ORDINARY[ordinary](each)
        assert relative_error(model(IDS), plain(IDS)) < 1e-6
    assert half_weights(model) or ordinary == "emptied and loaded"  # what was in memory may be beyond float16
    upcast.unpatch(model)
    assert relative_error(model(IDS), plain(IDS)) < 1e-6

"""What diagnose, search, ablate and certify have in common: bad input is refused, and nothing is changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.models import IDS as NET_IDS
from tests.models import Net, snapshot
from upcast import UpcastError
from upcast.analysis.result import Result
from upcast.tensor.half_weight import HalfWeight

MEASURES = [
    pytest.param(upcast.diagnose, id="diagnose"),
    pytest.param(lambda model, *inputs, **kwargs: upcast.search(model, *inputs, verbose=False, **kwargs), id="search"),
    pytest.param(upcast.ablate, id="ablate"),
]
BAD_INPUTS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((), {}, "no inputs; the model has to run to be measured. Pass token ids"),
    ((torch.ones(1, 2, device="meta"),), {}, "an input is on meta; upcast computes on the CPU"),
    (({"ids": torch.ones(1, 2, device="meta")},), {}, "an input is on meta; upcast computes on the CPU"),
    ((), {"ids": torch.ones(1, 2, device="meta")}, "an input is on meta; upcast computes on the CPU"),
    (("hello",), {}, "an input is a str; .* Encode text with the model's tokenizer first"),
    ((torch.full((1, 2), 1000),), {}, "Net fails in float32 already: IndexError"),
    (({"nonsense": NET_IDS},), {}, "Net fails in float32 already: TypeError: .*unexpected keyword argument"),
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(("inputs", "kwargs", "message"), BAD_INPUTS, ids=[m[:30] for *_, m in BAD_INPUTS])
def test_bad_inputs_are_refused_and_nothing_is_changed(measure: Any, inputs: Any, kwargs: Any, message: str) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(UpcastError, match=message):
        measure(model, *inputs, **kwargs)
    assert snapshot(model) == before


@pytest.mark.parametrize("measure", MEASURES)
def test_keyword_arguments_alone_are_a_sample(measure: Any) -> None:
    assert measure(Net(), ids=NET_IDS) is not None


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_found_has_one_shape(measure: Any, tmp_path: Path) -> None:
    """Several samples are a list of them, and every result prints, is written and is drawn in the same ways."""
    found = measure(Net(), [NET_IDS, NET_IDS.flip(0)])
    assert isinstance(found, Result)
    assert json.loads(found.to_json(tmp_path / "found.json")) == json.loads((tmp_path / "found.json").read_text())
    assert found.to_markdown().startswith("**")
    assert str(found).splitlines()[0] in found.to_markdown()
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("measure", MEASURES)
def test_a_result_that_is_not_finite_in_float32_is_refused_with_its_place(measure: Any) -> None:
    model = Net()
    handle = model.down.register_forward_hook(lambda module, args, out: out / 0)
    with pytest.raises(
        UpcastError, match=r"Net is not finite in float32 already.*, first in \(the model itself\): div"
    ):
        measure(model, NET_IDS)
    handle.remove()
    with torch.no_grad():
        model.down.weight[0, 0] = float("nan")
    with pytest.raises(UpcastError, match=r"first in down: linear \(down.weight itself is not finite\)"):
        measure(model, NET_IDS)


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.linear(x), 0.5, self.training)


class AttentionDropout(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2, dropout=0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        return super().forward(x, x, x)


RANDOM = {
    "layer": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)), r"training mode, where 1 \(Dropout\)"),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        r"training mode, where 1 \(BatchNorm1d\)",
    ),
    "function": (FunctionalDropout, "in training mode and draws random numbers"),
    "attention": (AttentionDropout, "in training mode and draws random numbers"),
    "lstm": (lambda: nn.LSTM(8, 8, num_layers=2, dropout=0.5), "in training mode and draws random numbers"),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", RANDOM)
def test_training_mode_with_dropout_is_refused(measure: Any, kind: str) -> None:
    build, message = RANDOM[kind]
    model = build().train()
    x = torch.randn(8, 8)
    with pytest.raises(UpcastError, match=rf"{message}.* model\.eval\(\)"):
        measure(model, x)
    assert not any(isinstance(p, HalfWeight) for p in model.parameters())
    measure(model.eval(), x)


def test_what_a_model_draws_in_eval_mode_is_drawn_again_in_every_pass() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.bernoulli(torch.full((8, 8), 0.5))

    model, x = Noisy().eval(), torch.randn(8, 8)
    assert not torch.equal(model(x), model(x))
    assert upcast.diagnose(model, [x, x]).error < 1e-2
    found = upcast.search(model, [x, x + 1], verbose=False)
    assert str(found.policy) == "none"
    assert found.samples == 2


def test_a_model_without_numbers_to_compare_is_refused() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).argmax(-1)

    with pytest.raises(UpcastError, match="without a floating-point tensor"):
        upcast.diagnose(Ids(), torch.ones(1, 4))

"""Libraries that keep a layer's forward by a name of their own, as accelerate's hooks do, and run it later.

When the layer is unpatched or converted, what they keep is the layer's own forward again.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import relative_error, rounded
from upcast.core import forward_override
from upcast.core.forward_override import Forward
from upcast.patching.training_switch import TrainingSwitch

accelerate = pytest.importorskip("accelerate")

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
ENDS: dict[str, Callable[[Any], object]] = {
    "unpatched": upcast.unpatch,
    "a piece unpatched": lambda model: upcast.unpatch(model[0]),
    "a layer converted": lambda model: model[0].to(torch.float64).to(torch.float32),
    "all converted": lambda model: model.double().float(),
}


def pair() -> tuple[Any, Any]:
    """Return (rounded float32 model, patched model), every layer of both wrapped by accelerate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    plain = rounded(model)
    for each in (plain, upcast.patch(model)):
        for layer in each:
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    return plain, model


def ours(module: nn.Module) -> list[Forward]:
    return [each for part in module.modules() for each in forward_override.kept(part)]


@pytest.mark.parametrize("end", ENDS)
@torch.no_grad()
def test_a_wrapped_layer_runs_when_it_is_patched_no_more(end: str) -> None:
    plain, patched = pair()
    assert relative_error(patched(X), plain(X)) < 1e-6
    ENDS[end](patched)
    assert relative_error(patched(X), plain(X)) < 1e-6
    assert not ours(patched[0])


@torch.no_grad()
def test_what_was_wrapped_takes_off_its_wrapping() -> None:
    plain, patched = pair()
    upcast.unpatch(patched)
    accelerate.hooks.remove_hook_from_module(patched, recurse=True)
    assert relative_error(patched(X), plain(X)) < 1e-6
    assert not ours(patched)
    assert relative_error(upcast.patch(patched)(X), plain(X)) < 1e-6


@torch.no_grad()
def test_layers_that_are_stored_in_one_dtype_and_computed_in_another() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    plain = rounded(model)
    for each in (plain, upcast.patch(model)):
        accelerate.big_modeling.attach_layerwise_casting_hooks(
            each, storage_dtype=torch.bfloat16, compute_dtype=torch.float32
        )
    assert relative_error(model(X), plain(X)) < 1e-6
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in plain.parameters()]


def test_another_method_that_is_kept_stays_that_method() -> None:
    model: Any = upcast.patch(nn.Sequential(nn.Linear(8, 8)))
    layer = model[0]
    assert isinstance(layer.train, TrainingSwitch)
    layer.kept_train = layer.train
    upcast.unpatch(model)
    layer.kept_train(False)
    assert not layer.training

"""A model's modules, as torch itself gives them."""

import pytest
import torch
from torch import nn

from tests.transformers_models import FAMILIES, make
from upcast.core.module_tree import modules, named_modules


def tangled() -> nn.Module:
    """Shared modules, empty places, a module inside itself."""
    shared, root = nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Sequential())
    root.add_module("a", nn.ModuleDict({"first": shared, "again": root[0]}))
    root.register_module("nothing", None)
    root[1].add_module("b", nn.ModuleList([shared, nn.Sequential(shared, nn.GELU())]))
    root[1].add_module("round", root)
    return root


MODELS = [lambda row=row: make(*row[:3]) for row in FAMILIES] + [tangled, lambda: nn.Linear(1, 1)]


@pytest.mark.parametrize("build", MODELS)
def test_modules_come_in_torch_s_order_under_torch_s_names(build: object) -> None:
    torch.manual_seed(0)
    model = build()  # type: ignore[operator]
    assert named_modules(model) == list(model.named_modules())
    assert modules(model) == list(model.modules())

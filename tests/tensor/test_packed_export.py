"""torch.export of packed weights: the program multiplies with them, and is right or says that it cannot be."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import relative_error
from tests.tensor.test_packed_weight import IDS, net
from upcast.tensor.packed_weight import PackedWeight


def reloaded(program: Any) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


PROGRAMS: dict[str, Callable[[nn.Module], Any]] = {
    "export": lambda model: torch.export.export(model, (IDS,)),
    "strict": lambda model: torch.export.export(model, (IDS,), strict=True),
    "any batch": lambda model: torch.export.export(
        model, (IDS,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    ),
    "lowered": lambda model: torch.export.export(model.requires_grad_(False), (IDS,)).run_decompositions(),
}


# torch's own, when it loads a program
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:The given buffer is not writable")
@pytest.mark.parametrize("way", PROGRAMS)
def test_an_exported_program_multiplies_with_packed_weights(way: str) -> None:
    model, plain = net()
    program = PROGRAMS[way](upcast.patch(model, storage="packed"))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"upcast.packed_linear.default", "upcast.packed_embedding.default"} <= called
    with torch.no_grad():
        for each in (program, reloaded(program)):
            ids = IDS.flip(1)
            assert relative_error(each.module()(ids), plain(ids)) < 1e-6
    assert isinstance(model.up.weight, PackedWeight)


def test_an_exported_program_takes_no_other_numbers() -> None:
    model, plain = net()
    module = reloaded(torch.export.export(upcast.patch(model, storage="packed"), (IDS,))).module()
    with torch.no_grad():
        module.up.weight.add_(1e-3)  # numbers that bfloat16 does not have
        with pytest.raises(upcast.UpcastError, match=r"other numbers than the program was exported with.*Export"):
            module(IDS)
        module.up.weight.copy_(plain.up.weight)
        assert relative_error(module(IDS), plain(IDS)) < 1e-6


@pytest.mark.parametrize(("value", "works"), [(0.0625, True), (3e38, False), (0.1, False)])
def test_a_program_of_a_weight_that_was_written_to_is_right_or_says_so(value: float, works: bool) -> None:
    """0.0625 has a first byte that is in the table; 3e38 is an escape more; bfloat16 does not have 0.1."""
    model, plain = net()
    module = torch.export.export(upcast.patch(model, storage="packed"), (IDS,)).module()
    with torch.no_grad():
        for each in (model, plain):
            each.up.weight[3, 5] = value
        if works:
            assert relative_error(module(IDS), plain(IDS)) < 1e-6
            return
        with pytest.raises(upcast.UpcastError, match="Export the model again"):
            module(IDS)

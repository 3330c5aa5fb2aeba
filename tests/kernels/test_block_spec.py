"""What Python calls the parts of a block is what C++ reads, in the same order."""

from typing import Any

import pytest
import torch

from tests.kernels.example_block import example
from upcast.core.errors import KernelError
from upcast.kernels import block_spec, native
from upcast.kernels.block_spec import BlockSpec, ExpertSpec, Matrix, Norm

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not there")

TUPLES = {"BlockSpec": BlockSpec, "ExpertSpec": ExpertSpec, "Matrix": Matrix, "Norm": Norm}
NUMBERED = ("PARTS", "ACTIVATIONS", "NORMS", "STORAGES")


def test_the_fields_are_those_of_the_kernel_in_its_order() -> None:
    layout = native._native.block_layout()
    assert layout.keys() == {*TUPLES, *NUMBERED}
    assert {name: kind._fields for name, kind in TUPLES.items()} == {name: layout[name] for name in TUPLES}
    for name in NUMBERED:
        assert getattr(block_spec, name) == {value: i for i, value in enumerate(layout[name])}, name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a list for a matrix": ({"proj": [None, None, 0]}, "a matrix of the block is no tuple of 3 items"),
    "a norm cut short": ({"norm_2": (None, None, 0)}, "a norm of the block is no tuple of 5 items"),
    "an unknown storage": ({"down": Matrix(torch.zeros(256, 512).half(), None, 2)}, "unknown storage"),
    "an unknown norm": ({"norm_k": Norm(kind=3)}, "unknown norm"),
    "an unknown activation": ({"activation": -1}, "unknown activation"),
    "an absent matrix": ({"gate": Matrix()}, "gate"),
    "float32 weights": ({"up": Matrix(torch.zeros(512, 256))}, "up is float32"),
    "a negative window": ({"window": -1}, "window or softcap is negative"),
    "a name for a number": ({"scale": "large"}, "plain tensors and numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_block_is_made_of_is_refused(case: str) -> None:
    values, message = REFUSED[case]
    x, cos, sin, spec = example()
    with pytest.raises(KernelError, match=message):
        native.block(x, cos, sin, None, None, spec._replace(**values))

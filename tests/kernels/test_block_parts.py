"""The parts of a block, with the residual and what follows added outside, equal the whole block."""

import pytest
import torch
from torch import Tensor

from tests.kernels.example_block import KINDS, UNEVEN, example
from upcast.core.errors import UpcastError
from upcast.kernels import native
from upcast.kernels.block_spec import PARTS, Matrix

WHOLE, ATTENTION, MLP, BOTH = PARTS.values()


def run(part: int, x: Tensor, kind: str) -> Tensor:
    _, cos, sin, spec = example()
    parallel, shared = KINDS[kind]
    changed = spec._replace(parallel=parallel, shared=shared, norm_2=UNEVEN)
    out = native.block(x, cos, sin, None, None, changed, part=part)
    assert out is not None
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_block(kind: str) -> None:
    x = example()[0]
    whole = run(WHOLE, x, kind)
    attended = run(ATTENTION, x, kind)
    if kind == "sequential":
        parts = [x + attended + run(MLP, x + attended, kind)]
    else:
        parts = [x + attended + run(MLP, x, kind), x + run(BOTH, x, kind)]
    assert not torch.allclose(whole, x, atol=1e-2)
    for each in parts:
        torch.testing.assert_close(each, whole, rtol=1e-5, atol=1e-6)


def test_parts_that_are_none_are_refused() -> None:
    x = example()[0]
    with pytest.raises(UpcastError, match=r"unknown part; a block has 0 \(all of it\) to 3"):
        run(4, x, "parallel")
    with pytest.raises(UpcastError, match="both branches at once, of a block whose MLP reads what attention gave"):
        run(BOTH, x, "sequential")
    x, cos, sin, spec = example()
    with pytest.raises(UpcastError, match="a norm after a part of a block"):
        native.block(x, cos, sin, None, None, spec._replace(post_attention=UNEVEN), part=ATTENTION)


def test_attention_alone_needs_no_mlp() -> None:
    x, cos, sin, spec = example()
    without = spec._replace(gate=Matrix(), up=Matrix(), down=Matrix())
    attended = native.block(x, cos, sin, None, None, without, part=ATTENTION)
    assert attended is not None
    assert torch.equal(attended, run(ATTENTION, x, "sequential"))
    for part in (WHOLE, MLP):
        with pytest.raises(UpcastError, match="gate"):
            native.block(x, cos, sin, None, None, without, part=part)
    with pytest.raises(UpcastError, match="do not fit"):  # a part of an MLP is none
        native.block(x, cos, sin, None, None, spec._replace(down=Matrix()), part=ATTENTION)

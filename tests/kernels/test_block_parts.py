"""The parts of a block, with the residual and what follows added outside, equal the whole block."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_block_threads import arguments
from upcast.core.errors import UpcastError
from upcast.kernels import native

PARALLEL, SHARED, NORM_2, POST_ATTENTION = 5, 6, 32, 37  # where the plan has them
KINDS = {"sequential": (False, False), "parallel": (True, False), "shared": (True, True)}


def run(part: int, x: Tensor, kind: str) -> Tensor:
    _, cos, sin, keys, values, plan = arguments()
    changed = [part, *plan[1:]]
    changed[PARALLEL : SHARED + 1] = KINDS[kind]
    changed[NORM_2] = torch.linspace(0.5, 2.0, x.shape[-1])
    out = native.block(x, cos, sin, keys, values, tuple(changed))
    assert out is not None
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_block(kind: str) -> None:
    x: Any = arguments()[0]
    whole = run(native.WHOLE, x, kind)
    attended = run(native.ATTENTION, x, kind)
    if kind == "sequential":
        parts = [x + attended + run(native.MLP, x + attended, kind)]
    else:
        parts = [x + attended + run(native.MLP, x, kind), x + run(native.BOTH, x, kind)]
    assert not torch.allclose(whole, x, atol=1e-2)
    for each in parts:
        torch.testing.assert_close(each, whole, rtol=1e-5, atol=1e-6)


def test_parts_that_are_none_are_refused() -> None:
    x: Any = arguments()[0]
    with pytest.raises(UpcastError, match=r"unknown part; a block has 0 \(all of it\) to 3"):
        run(4, x, "parallel")
    with pytest.raises(UpcastError, match="both branches at once, of a block whose MLP reads what attention gave"):
        run(native.BOTH, x, "sequential")
    *rest, plan = arguments()
    post = [native.ATTENTION, *plan[1:]]
    post[POST_ATTENTION : POST_ATTENTION + 5] = (torch.ones(x.shape[-1]), None, 1, 1e-5, 0.0)
    with pytest.raises(UpcastError, match="a norm after a part of a block"):
        native.block(*rest, tuple(post))

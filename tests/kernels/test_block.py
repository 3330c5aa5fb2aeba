"""A block's queries, keys and values in one matrix or three, and angles that differ between the rows of a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.kernels.test_block_threads import HEAD, TIME, WIDTH, arguments
from upcast.kernels import native

QKV = 13  # where the matrices begin in the plan: query, bias, key, bias, value, bias


def run(x: Tensor, cos: Tensor, sin: Tensor, plan: tuple[Any, ...]) -> Tensor:
    out = native.block(x, cos, sin, None, None, plan)
    assert out is not None
    return out


def with_matrices(plan: tuple[Any, ...], *matrices: Any) -> tuple[Any, ...]:
    return (*plan[:QKV], *matrices, *plan[QKV + 6 :])


@pytest.mark.parametrize("biased", [False, True])
def test_three_matrices_give_what_one_gives(biased: bool) -> None:
    x, cos, sin, _, _, plan = arguments()
    whole = plan[QKV]
    bias = torch.randn(3 * WIDTH) if biased else None
    parts = zip(whole.split(WIDTH), bias.split(WIDTH) if bias is not None else [None] * 3, strict=True)
    want = run(x, cos, sin, with_matrices(plan, whole, bias, None, None, None, None))
    got = run(x, cos, sin, with_matrices(plan, *(item for part in parts for item in part)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_every_row_of_a_batch_may_have_angles_of_its_own() -> None:
    x, _, _, _, _, plan = arguments()
    batch = torch.cat([x, x, x.flip(1)])
    angles = torch.randn(3, TIME, HEAD)
    got = run(batch, angles.cos(), angles.sin(), plan)
    for row in range(3):
        want = run(batch[row : row + 1], angles[row].cos(), angles[row].sin(), plan)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got[0], got[1])
    shared = run(batch, angles[:1].cos(), angles[:1].sin(), plan)
    torch.testing.assert_close(shared[0], got[0], rtol=1e-6, atol=1e-6)


def thirds(plan: tuple[Any, ...]) -> list[Tensor]:
    return list(plan[QKV].split(WIDTH))


REFUSED: dict[str, Any] = {
    "key without value": lambda w: (w[0], None, w[1], None, None, None),
    "value without key": lambda w: (w[0], None, None, None, w[2], None),
    "one matrix and its parts": lambda w: (torch.cat(w), None, w[1], None, w[2], None),
    "a key of another height": lambda w: (w[0], None, w[1][:-1], None, w[2], None),
    "a value of another width": lambda w: (w[0], None, w[1], None, w[2][:, :-1], None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_matrices_that_do_not_fit_are_refused(case: str) -> None:
    x, cos, sin, _, _, plan = arguments()
    with pytest.raises(upcast.UpcastError, match="do not fit its heads and one another"):
        native.block(x, cos, sin, None, None, with_matrices(plan, *REFUSED[case](thirds(plan))))


@pytest.mark.parametrize("shape", [(2, TIME, HEAD), (1, TIME + 1, HEAD), (1, 1, TIME, HEAD), (HEAD,)], ids=str)
def test_angles_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    x, *_, plan = arguments()
    with pytest.raises(upcast.UpcastError):
        native.block(x, torch.ones(shape), torch.ones(shape), None, None, plan)

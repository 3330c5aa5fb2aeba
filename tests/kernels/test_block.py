"""A block's queries, keys and values in one matrix or three, and angles that differ between the rows of a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.kernels.example_block import HEAD, TIME, WIDTH, changed, example, thirds, with_matrices
from upcast.kernels import native
from upcast.kernels.block_spec import BlockSpec, Matrix


def run(x: Tensor, cos: Tensor, sin: Tensor, spec: BlockSpec) -> Tensor:
    out = native.block(x, cos, sin, None, None, spec)
    assert out is not None
    return out


@pytest.mark.parametrize("biased", [False, True])
def test_three_matrices_give_what_one_gives(biased: bool) -> None:
    x, cos, sin, spec = example()
    spec = changed() if biased else spec
    want = run(x, cos, sin, spec)
    got = run(x, cos, sin, with_matrices(spec, *thirds(spec)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_every_row_of_a_batch_may_have_angles_of_its_own() -> None:
    x, _, _, spec = example()
    batch = torch.cat([x, x, x.flip(1)])
    angles = torch.randn(3, TIME, HEAD)
    got = run(batch, angles.cos(), angles.sin(), spec)
    for row in range(3):
        want = run(batch[row : row + 1], angles[row].cos(), angles[row].sin(), spec)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got[0], got[1])
    shared = run(batch, angles[:1].cos(), angles[:1].sin(), spec)
    torch.testing.assert_close(shared[0], got[0], rtol=1e-6, atol=1e-6)


def cut(matrix: Matrix, rows: int, columns: int) -> Matrix:
    assert matrix.weight is not None
    return Matrix(matrix.weight[:rows, :columns])


REFUSED: dict[str, Any] = {
    "key without value": lambda whole, q, k, v: (q, k, Matrix()),
    "value without key": lambda whole, q, k, v: (q, Matrix(), v),
    "one matrix and its parts": lambda whole, q, k, v: (whole, k, v),
    "a key of another height": lambda whole, q, k, v: (q, cut(k, WIDTH - 1, WIDTH), v),
    "a value of another width": lambda whole, q, k, v: (q, k, cut(v, WIDTH, WIDTH - 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_matrices_that_do_not_fit_are_refused(case: str) -> None:
    x, cos, sin, spec = example()
    with pytest.raises(upcast.UpcastError, match="do not fit its heads and one another"):
        run(x, cos, sin, with_matrices(spec, *REFUSED[case](spec.qkv, *thirds(spec))))


@pytest.mark.parametrize("shape", [(2, TIME, HEAD), (1, TIME + 1, HEAD), (1, 1, TIME, HEAD), (HEAD,)], ids=str)
def test_angles_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    x, _, _, spec = example()
    with pytest.raises(upcast.UpcastError):
        run(x, torch.ones(shape), torch.ones(shape), spec)

"""A row of x gives the same bits alone, in a batch of any size, beside padding, and with any number of threads."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from upcast.kernels import native, tuning
from upcast.kernels.tuning import READINGS, Tuning

pytestmark = pytest.mark.skipif(not native.available(), reason="native kernels")

SHAPES = [(1, 1), (37, 33), (130, 576), (64, 1023), (48, 4500)]  # the last adds up more than one chain
BATCHES = range(1, 20)
POSITIONS = [3, 95, 96, 97, 300]  # around a span of scores, and several
HEADS = [(1, 1, 64), (4, 4, 33), (9, 3, 64), (16, 1, 130)]  # of queries, of the cache, width


@pytest.fixture
def readings() -> Iterator[None]:
    """The way that weights were read before."""
    yield
    tuning.use(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads that was before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(isa: str, readings: None, shape: tuple[int, int]) -> None:
    weight, bias = torch.randn(shape).half(), torch.randn(shape[0])
    x, residual = torch.randn(BATCHES[-1], shape[1]), torch.randn(BATCHES[-1], shape[0])
    alone = torch.cat([native.linear(x[i : i + 1], weight, bias, residual[i : i + 1]) for i in range(len(x))])
    for reading in READINGS:
        tuning.use(Tuning(reading, 0))
        for rows in BATCHES:
            assert torch.equal(native.linear(x[:rows], weight, bias, residual[:rows]), alone[:rows]), (reading, rows)


def cache(heads: tuple[int, int, int], batch: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries for eight positions, and keys and values."""
    queries, shared, width = heads
    keys, values = torch.randn(2, batch, shared, positions + 8, width).half()
    return torch.randn(batch, queries, 8, width), keys, values


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(isa: str, threads: None, heads: tuple[int, int, int], positions: int) -> None:
    q, k, v = cache(heads, 3, positions)
    for window in (None, 50):
        torch.set_num_threads(1)
        alone = [
            native.attention(q[b : b + 1, :, t : t + 1], k[b : b + 1], v[b : b + 1], start=positions + t, window=window)
            for b in range(3)
            for t in range(8)
        ]
        expected = torch.cat(alone, 2).reshape(1, heads[0], 3, 8, heads[2])[0].transpose(0, 1)
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(native.attention(q, k, v, start=positions, window=window), expected), (window, count)

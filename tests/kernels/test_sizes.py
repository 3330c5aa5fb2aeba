"""Sizes of any length beside a 0: tensors that hold nothing, whose products with other sizes would overflow."""

import pytest
import torch

from tests.kernels.example_block import example
from upcast.core.errors import UpcastError
from upcast.kernels import native
from upcast.kernels.block_spec import Matrix, Norm

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not there")

HUGE = 2**32


def empty_block(batch: int, time: int, heads: int, width: int) -> object:
    """Run a block of C = 0 whose queries have ``heads`` heads of ``width``."""

    def half(*sizes: int) -> Matrix:
        return Matrix(torch.empty(sizes, dtype=torch.float16))

    spec = example()[-1]._replace(heads=heads, groups=heads, head_width=width, norm_1=Norm(), norm_2=Norm())
    attention = {"qkv": half(3 * heads * width, 0), "proj": half(0, heads * width)}
    empty = spec._replace(**attention, gate=half(0, 0), up=Matrix(), down=half(0, 0), key_limit=4.0, value_limit=8.0)
    angles = torch.empty(time, 2)
    return native.block(torch.empty(batch, time, 0), angles, angles, None, None, empty)


@pytest.mark.parametrize(
    ("batch", "time", "heads", "width"),
    [(HUGE, 1, 1, HUGE), (HUGE, 1, 2, HUGE // 2), (1, 2**20, 2**20, 2**20), (2**40, 1, 2**20, 2), (2**45, 1, 1, 2)],
)
def test_a_block_larger_than_any_memory_is_refused(batch: int, time: int, heads: int, width: int) -> None:
    with pytest.raises(UpcastError, match=r"larger than any memory|sizes beyond any memory"):
        empty_block(batch, time, heads, width)


@pytest.mark.parametrize("shape", [(2**40, 2**10, 0), (2**61, 0), (2**31, 2**31, 0)])
def test_a_tensor_larger_than_any_memory_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UpcastError, match="x has sizes beyond any memory"):
        native.survey(torch.empty(shape))


@pytest.mark.parametrize("start", [2**63 - 1, 2**62, -(2**63), -1, 3])
def test_positions_outside_a_cache_are_counted_without_overflow(start: int) -> None:
    cache = torch.empty(1, 1, 4, 2, dtype=torch.float16)
    with pytest.raises(UpcastError, match=f"2 positions from {start} on do not lie in cache, which holds 4"):
        native.kv_append(cache, torch.empty(1, 1, 2, 2), start)

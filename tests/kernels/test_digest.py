"""The checksum of tensors: any bit that differs shows, and nothing else does."""

import pytest
import torch
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernels are not loaded")

PIECE = 1 << 18  # bytes that one thread reads at once
SIZES = (1, 2, 31, 32, 33, 100, PIECE // 2 - 1, PIECE // 2, PIECE // 2 + 1, 3 * PIECE // 2 + 7)


def numbers(count: int) -> Tensor:
    return torch.randint(-32768, 32767, (count,), dtype=torch.int16).view(torch.float16)


@pytest.mark.parametrize("count", SIZES)
def test_every_bit_counts(count: int) -> None:
    x = numbers(count)
    before = native.digest([x])
    raw = x.view(torch.int16)
    for place in sorted({0, count // 2, count - 1}):
        for bit in (0, 9, 15):
            raw[place] ^= -32768 if bit == 15 else 1 << bit
            assert native.digest([x]) != before
            raw[place] ^= -32768 if bit == 15 else 1 << bit
    assert native.digest([x]) == before
    assert native.digest([x.clone()]) == before


# what is done to three tensors of 64 x 40
CHANGES = {
    "rows swapped": lambda a, b, c: [a.flip(0), b, c],
    "columns swapped": lambda a, b, c: [a, b.flip(1), c],
    "tensors swapped": lambda a, b, c: [b, a, c],
    "one left out": lambda a, b, c: [a, c],
    "one twice": lambda a, b, c: [a, b, b],
    "zeros behind": lambda a, b, c: [a, b, torch.cat([c, torch.zeros(1, 40)])],
    "another sign of zero": lambda a, b, c: [a, b, torch.where(c == 0, -0.0, c)],
    "stripes swapped": lambda a, b, c: [a.view(-1, 16).flip(0), b, c],
    "halves of a stripe swapped": lambda a, b, c: [a.view(-1, 2, 4).flip(1), b, c],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", CHANGES)
def test_order_counts(name: str, dtype: torch.dtype) -> None:
    three = [torch.randn(64, 40) for _ in range(3)]
    three[2][5, 5] = 0
    before = native.digest([each.to(dtype) for each in three])
    assert native.digest([each.to(dtype) for each in CHANGES[name](*three)]) != before


LAYOUTS = {
    "a view of rows": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "between two vectors": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_of_rows_is_as_good_as_another(name: str) -> None:
    x = torch.randn(3, 5, 24)
    assert LAYOUTS[name](x).equal(x)
    assert native.digest([LAYOUTS[name](x).contiguous()]) == native.digest([x])
    before, other = native.digest([LAYOUTS[name](x)]), x.clone()
    other[2, 4, 23] += 1
    assert native.digest([LAYOUTS[name](x)]) == before != native.digest([LAYOUTS[name](other)])


def test_threads_do_not_count() -> None:
    x, threads = [numbers(count) for count in SIZES], torch.get_num_threads()
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(native.digest(x))
    torch.set_num_threads(threads)
    assert len(found) == 1


def test_nothing_has_a_checksum() -> None:
    empty = native.digest([])
    assert native.digest([torch.zeros(0), torch.zeros(0, 3)]) == empty
    assert len({empty, *(native.digest([torch.zeros(count)]) for count in (1, 2, 3, 16, 17))}) == 6


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)])
def test_other_dtypes_are_refused(tensor: Tensor) -> None:
    with pytest.raises(UpcastError, match="a tensor is"):
        native.digest([tensor])

"""A row of a batch that sees its cache from a position on equals that row by itself, with the cache from there on."""

import pytest
import torch

from tests.kernels.example_block import TIME, caches, changed, inputs
from upcast.core.errors import UpcastError
from upcast.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="native kernels")

FIRST = [[0, 0, 0], [2, 0, 3], [3, 3, 3]]
ROWS = 3  # that the cache holds before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [0, 2, 4])
@pytest.mark.parametrize("first", FIRST, ids=str)
def test_a_row_equals_itself_alone(first: list[int], window: int, dtype: torch.dtype) -> None:
    x, cos, sin = inputs(len(first))
    keys, values = caches(len(first), dtype)
    spec = changed()._replace(window=window)
    alone = [[each[row : row + 1, :, at:].clone() for each in (keys, values)] for row, at in enumerate(first)]
    got = native.block(x, cos, sin, keys, values, spec, (ROWS, ROWS), first=torch.tensor(first))
    assert got is not None
    for row, at in enumerate(first):
        start = (ROWS - at, ROWS - at)
        want = native.block(x[row : row + 1], cos, sin, *alone[row], spec, start)
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(keys[row : row + 1, :, at:], alone[row][0], rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not native.can_call_blocks(), reason="torch has no exchange interface")
def test_blocks_in_one_call_take_it_too() -> None:
    x, cos, sin = inputs(3)
    spec, first = changed(), torch.tensor([2, 0, 3])
    one, all_at_once = caches(3, torch.float16), caches(3, torch.float16)
    want = native.block(x, cos, sin, *one, spec, (ROWS, ROWS), first=first)
    got, done = native.blocks(x, ((ROWS, ROWS, cos, sin, first),), ((0, *all_at_once, spec),))
    assert done == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


REFUSED = {
    "for another batch": torch.zeros(2, dtype=torch.int64),
    "a position that the first query does not see": torch.tensor([0, ROWS + 1, 0]),
    "a negative one": torch.tensor([0, -1, 0]),
    "int32": torch.zeros(3, dtype=torch.int32),
    "two dimensions": torch.zeros(3, 1, dtype=torch.int64),
    "apart": torch.zeros(6, dtype=torch.int64)[::2],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    x, cos, sin = inputs(3)
    keys, values = caches(3, torch.float16)
    with pytest.raises(UpcastError):
        native.block(x, cos, sin, keys, values, changed(), (ROWS, ROWS), first=REFUSED[case])
    assert torch.equal(keys, caches(3, torch.float16)[0])
    assert x.shape[1] == TIME

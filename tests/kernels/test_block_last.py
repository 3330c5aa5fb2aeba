"""The last positions of a block alone equal those of the whole, and the cache gets every position all the same."""

import pytest
import torch

from tests.kernels.example_block import KINDS, TIME, WIDTH, caches, changed, inputs, scaled
from upcast.core.errors import UpcastError
from upcast.kernels import native
from upcast.kernels.block_spec import PARTS

LAST = [1, 2, TIME]
BATCH = [1, 3]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("last", LAST)
def test_the_last_positions_are_those_of_the_whole(last: int, batch: int, kind: str, split: bool) -> None:
    x, cos, sin = inputs(batch)
    spec = changed(kind, split)
    whole = native.block(x, cos, sin, None, None, spec)
    some = native.block(x, cos, sin, None, None, spec, last=last)
    assert whole is not None
    assert some is not None
    assert some.shape == (batch, last, WIDTH)
    torch.testing.assert_close(some, whole[:, -last:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("last", LAST)
def test_a_cache_gets_every_position(last: int, batch: int, dtype: torch.dtype) -> None:
    x, cos, sin = inputs(batch)
    spec, seen = changed(), []
    for count in (None, last):
        keys, values = caches(batch, dtype)
        out = native.block(x, cos, sin, keys, values, spec, (3, 3), last=count)
        assert out is not None
        seen.append((out[:, -last:], keys, values))
    rounding = 1e-5 if dtype is torch.float32 else 1e-3  # a sum in another order may round to the next float16
    for some, whole in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(some, whole, rtol=rounding, atol=rounding)
    assert not torch.equal(seen[1][1], caches(batch, dtype)[0])


def test_what_does_not_fit_the_cache_is_told_before_anything_is_written() -> None:
    x, cos, sin = inputs(1)
    spec = changed()._replace(norm_k=scaled(1e6))
    keys, values = caches(1, torch.float16)
    assert native.block(x, cos, sin, keys, values, spec, last=1) is None
    assert torch.equal(keys, caches(1, torch.float16)[0])


@pytest.mark.parametrize("last", [0, TIME + 1])
def test_more_or_fewer_than_there_are_is_refused(last: int) -> None:
    x, cos, sin = inputs(1)
    with pytest.raises(UpcastError, match="out does not fit x"):
        native.block(x, cos, sin, None, None, changed(), last=last)


def test_the_last_positions_of_a_part_are_refused() -> None:
    x, cos, sin = inputs(1)
    with pytest.raises(UpcastError, match="the last positions of a part of a block"):
        native.block(x, cos, sin, None, None, changed(), part=PARTS["attention"], last=1)

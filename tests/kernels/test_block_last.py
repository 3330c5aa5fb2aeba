"""The last positions of a block alone equal those of the whole, and the cache gets every position all the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_block_threads import HEAD, HEADS, TIME, WIDTH, arguments
from upcast.core.errors import UpcastError
from upcast.kernels import native

LAST = [1, 2, TIME]
BATCH = [1, 3]
KINDS = {"sequential": (False, False), "parallel": (True, False), "shared": (True, True)}
QKV, PARALLEL, NORM_2, NORM_Q, NORM_K = 13, 5, 32, 47, 52  # where the plan has them
START, WRITE = 11, 12


def changed(kind: str = "sequential", split: bool = False, place: int = 0) -> tuple[Any, ...]:
    """The plan with biases, different norms and norms of the heads; `split`: query, key and value apart."""
    plan: list[Any] = list(arguments()[-1])
    plan[PARALLEL : PARALLEL + 2] = KINDS[kind]
    plan[NORM_2] = torch.linspace(0.5, 2.0, WIDTH)
    plan[NORM_Q : NORM_Q + 5] = plan[NORM_K : NORM_K + 5] = (torch.linspace(0.5, 2.0, WIDTH), None, 1, 1e-5, 0.0)
    plan[START] = plan[WRITE] = place
    weight, bias = plan[QKV], torch.linspace(-1.0, 1.0, 3 * WIDTH)
    plan[QKV : QKV + 6] = (weight, bias, *[None] * 4)
    if split:
        pairs = zip(weight.split(WIDTH), bias.split(WIDTH), strict=True)
        plan[QKV : QKV + 6] = [item for pair in pairs for item in pair]
    return tuple(plan)


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x, cos, sin, *_ = arguments()
    return torch.cat([x * (1 + i) for i in range(batch)]), cos, sin


def caches(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(batch, HEADS, 2 * TIME, HEAD, generator=generator).to(dtype) for _ in range(2))
    return keys, values


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("last", LAST)
def test_the_last_positions_are_those_of_the_whole(last: int, batch: int, kind: str, split: bool) -> None:
    x, cos, sin = inputs(batch)
    plan = changed(kind, split)
    whole = native.block(x, cos, sin, None, None, plan)
    some = native.block(x, cos, sin, None, None, plan, last)
    assert whole is not None
    assert some is not None
    assert some.shape == (batch, last, WIDTH)
    torch.testing.assert_close(some, whole[:, -last:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("last", LAST)
def test_a_cache_gets_every_position(last: int, batch: int, dtype: torch.dtype) -> None:
    x, cos, sin = inputs(batch)
    plan, seen = changed(place=3), []
    for count in (None, last):
        keys, values = caches(batch, dtype)
        out = native.block(x, cos, sin, keys, values, plan, count)
        assert out is not None
        seen.append((out[:, -last:], keys, values))
    for some, whole in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen[1][1], caches(batch, dtype)[0])


def test_what_does_not_fit_the_cache_is_told_before_anything_is_written() -> None:
    x, cos, sin = inputs(1)
    plan = list(changed())
    plan[NORM_K : NORM_K + 5] = (torch.full((WIDTH,), 1e6), None, 1, 1e-5, 0.0)
    keys, values = caches(1, torch.float16)
    assert native.block(x, cos, sin, keys, values, tuple(plan), 1) is None
    assert torch.equal(keys, caches(1, torch.float16)[0])


@pytest.mark.parametrize("last", [0, TIME + 1])
def test_more_or_fewer_than_there_are_is_refused(last: int) -> None:
    x, cos, sin = inputs(1)
    with pytest.raises(UpcastError, match="out does not fit x"):
        native.block(x, cos, sin, None, None, changed(), last)


def test_the_last_positions_of_a_part_are_refused() -> None:
    x, cos, sin = inputs(1)
    plan = (native.ATTENTION, *changed()[1:])
    with pytest.raises(UpcastError, match="the last positions of a part of a block"):
        native.block(x, cos, sin, None, None, plan, 1)

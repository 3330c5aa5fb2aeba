"""Blocks in one call equal blocks called one by one, and a cache that is too narrow stops them where it is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import relative_error
from tests.kernels.example_block import KINDS, TIME, WIDTH, caches, changed, inputs, scaled
from upcast.core.errors import UpcastError
from upcast.kernels import native, packed
from upcast.kernels.block_spec import NORMS, STORAGES, BlockSpec, Matrix, Norm

pytestmark = pytest.mark.skipif(not native.can_call_blocks(), reason="torch has no exchange interface")

COUNTS = [1, 2, 3, 6]
BATCH = [1, 3]
LAST = [None, 1, TIME]
PLACES = [0, 3]  # the positions' starts, taken in turn


Steps = list[tuple[int, Tensor, Tensor, BlockSpec]]  # index of the place, keys, values, what the block is


def stack(count: int, batch: int, dtype: torch.dtype) -> Steps:
    specs = [changed([*KINDS][i % len(KINDS)], split=i % 2 == 1) for i in range(count)]
    return [(i % len(PLACES), *caches(batch, dtype), spec) for i, spec in enumerate(specs)]


def call(x: Tensor, cos: Tensor, sin: Tensor, steps: Steps, last: int | None = None) -> tuple[Tensor, int]:
    return native.blocks(x, tuple((start, start, cos, sin, None) for start in PLACES), tuple(steps), last)


def one_by_one(x: Tensor, cos: Tensor, sin: Tensor, steps: Steps) -> Tensor:
    for place, keys, values, spec in steps:
        out = native.block(x, cos, sin, keys, values, spec, (PLACES[place],) * 2)
        assert out is not None
        x = out
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("batch", BATCH)
@pytest.mark.parametrize("count", COUNTS)
def test_one_call_gives_what_many_give(count: int, batch: int, last: int | None, dtype: torch.dtype) -> None:
    x, cos, sin = inputs(batch)
    before = x.clone()
    single, steps = stack(count, batch, dtype), stack(count, batch, dtype)
    want = one_by_one(x, cos, sin, single)[:, -(last or TIME) :]
    got, done = call(x, cos, sin, steps, last)
    assert done == count
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for (_, *mine, _), (_, *theirs, _) in zip(steps, single, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    assert torch.equal(x, before)


NARROW: dict[str, tuple[float, tuple[float, float]]] = {  # what scales the keys, and the limits of keys and values
    "beyond float16": (1e6, (0.0, 0.0)),
    "large keys": (10.0, (4.0, 0.0)),
    "large values": (1.0, (0.0, 1e-3)),
}


@pytest.mark.parametrize("why", NARROW)
@pytest.mark.parametrize("narrow", [0, 1, 2, 3])
def test_a_cache_that_is_too_narrow_stops_them(narrow: int, why: str) -> None:
    x, cos, sin = inputs(1)
    steps = stack(4, 1, torch.float16)
    place, keys, values, spec = steps[narrow]
    scale, (key_limit, value_limit) = NARROW[why]
    large = spec._replace(norm_k=scaled(scale), key_limit=key_limit, value_limit=value_limit)
    steps[narrow] = (place, keys, values, large)
    before = values.clone() if why == "large values" else keys.clone()
    want = one_by_one(x, cos, sin, stack(4, 1, torch.float16)[:narrow])
    reached, done = call(x, cos, sin, steps)
    assert done == narrow
    assert torch.equal(values if why == "large values" else keys, before)
    torch.testing.assert_close(reached, want, rtol=1e-4, atol=1e-4)
    steps[narrow] = (place, keys.float(), values.float(), large)
    _, rest = call(reached, cos, sin, steps[narrow:])
    assert done + rest == 4


NORM = {
    "none": Norm(),
    "rms": Norm(torch.linspace(0.5, 2, WIDTH), None, NORMS["rms"], 1e-5, 1.0),
    "layer": Norm(torch.linspace(0.5, 2, WIDTH), torch.linspace(-1, 1, WIDTH), NORMS["layer"], 1e-5),
}
HEAD = torch.linspace(-1, 1, 67 * WIDTH).view(67, WIDTH).bfloat16().half()
HEADS = {
    "float16": Matrix(HEAD),
    "with a bias": Matrix(HEAD, torch.linspace(-3, 3, 67)),
    "packed": Matrix(packed.pack(HEAD), None, STORAGES["packed"]),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", NORM)
def test_a_norm_and_a_head_follow(norm: str, head: str, last: int | None) -> None:
    x, cos, sin = inputs(2)
    reached, _ = call(x, cos, sin, stack(2, 2, torch.float32), last)
    steps, at = stack(2, 2, torch.float32), tuple((start, start, cos, sin, None) for start in PLACES)
    got, done = native.blocks(x, at, tuple(steps), last, (NORM[norm], HEADS[head]))
    assert done == 2
    weight, bias, kind, eps, offset = NORM[norm]
    normed = reached if weight is None else (weight + offset) * F.layer_norm(reached, (WIDTH,), eps=eps)
    if kind == NORMS["rms"]:
        normed = (NORM["rms"].weight + offset) * reached * (reached.square().mean(-1, True) + eps).rsqrt()
    elif bias is not None:
        normed = normed + bias
    want = F.linear(normed.double(), HEAD.double()) + (0 if HEADS[head].bias is None else HEADS[head].bias)
    assert got.shape == (2, last or TIME, 67)
    assert relative_error(got, want) < 2e-6


def test_none_follow_a_cache_that_is_too_narrow() -> None:
    x, cos, sin = inputs(1)
    place, keys, values, spec = stack(1, 1, torch.float16)[0]
    narrow = (place, keys, values, spec._replace(key_limit=1e-3))
    reached, done = native.blocks(x, ((0, 0, cos, sin, None),), (narrow,), None, (NORM["rms"], HEADS["float16"]))
    assert done == 0
    assert reached is x


def test_no_blocks_are_none() -> None:
    x, cos, sin = inputs(1)
    assert call(x, cos, sin, [])[1] == 0


ENDS: dict[str, Any] = {
    "a head of another width": (NORM["rms"], Matrix(HEAD[:, 1:])),
    "a head in float32": (NORM["rms"], Matrix(HEAD.float())),
    "no head": (NORM["rms"], Matrix()),
    "a norm of another width": (Norm(torch.ones(WIDTH - 1), None, NORMS["rms"], 1e-5), Matrix(HEAD)),
    "a norm that is none": (HEADS["float16"], HEADS["float16"]),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends_that_do_not_fit_are_refused(case: str) -> None:
    x, cos, sin = inputs(1)
    keys, values = caches(1, torch.float16)
    with pytest.raises(UpcastError):
        native.blocks(x, ((0, 0, cos, sin, None),), ((0, keys, values, changed()),), None, ENDS[case])
    with pytest.raises(UpcastError, match="no block"):
        native.blocks(x, (), (), None, (NORM["rms"], HEADS["float16"]))
    assert torch.equal(keys, caches(1, torch.float16)[0])


REFUSED: dict[str, Any] = {
    "a place that is none": lambda x, place, block: (x, (place,), ((1, *block[1:]),)),
    "a place below the first": lambda x, place, block: (x, (place,), ((-1, *block[1:]),)),
    "a place without angles": lambda x, place, block: (x, (place[:2],), (block,)),
    "a block that is too short": lambda x, place, block: (x, (place,), (block[:-1],)),
    "a block that is no tuple": lambda x, place, block: (x, (place,), ([*block],)),
    "places in a list": lambda x, place, block: (x, [place], (block,)),
    "blocks in a list": lambda x, place, block: (x, (place,), [block]),
    "positions beyond the cache": lambda x, place, block: (x, ((2 * TIME, 2 * TIME, *place[2:]),), (block,)),
    "a second block that does not fit": lambda x, place, block: (
        x,
        (place,),
        (block, (*block[:3], block[3]._replace(heads=9))),
    ),
    "a block that is cut short": lambda x, place, block: (x, (place,), ((*block[:3], block[3][:-1]),)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(case: str) -> None:
    x, cos, sin = inputs(1)
    keys, values = caches(1, torch.float16)
    block = (0, keys, values, changed())
    with pytest.raises(UpcastError):
        native.blocks(*REFUSED[case](x, (0, 0, cos, sin, None), block))
    assert torch.equal(keys, caches(1, torch.float16)[0])

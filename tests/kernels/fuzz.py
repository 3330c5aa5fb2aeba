"""Random shapes, strides, dtypes and levels through the Python surface, for the given number of seconds.

Every call must agree with float64, or be refused with an UpcastError: `python tests/kernels/fuzz.py 30`.
"""

import random
import sys
import time

import torch
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.kernels import native, packed, packed_native, reference

DTYPES = [torch.float32] * 12 + [torch.float16, torch.float64, torch.bfloat16, torch.int64]


def view(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape: contiguous, shifted, transposed or strided."""
    values = torch.randn(*shape[:-1], 2 * shape[-1] + 3).mul(2).to(dtype)
    kind = random.randrange(4)
    if kind == 0:
        return values[..., : shape[-1]].contiguous()
    if kind == 1:
        return values[..., 1 : 1 + shape[-1]]
    if kind == 2:
        return values[..., : 2 * shape[-1] : 2]
    return values[..., : shape[-1]].transpose(0, -1).contiguous().transpose(0, -1)


def linear() -> None:
    rows, inner, outer = random.randrange(70), random.randrange(1, 200), random.randrange(1, 200)
    x = view(rows, inner + (random.random() < 0.03), dtype=random.choice(DTYPES))
    weight = view(outer, inner, dtype=torch.float16 if random.random() < 0.95 else random.choice(DTYPES))
    bias = view(outer, dtype=random.choice(DTYPES)) if random.random() < 0.5 else None
    residual = view(rows, outer, dtype=random.choice(DTYPES)) if random.random() < 0.5 else None
    result = native.linear(x, weight, bias, residual)
    exact = x.double() @ weight.double().t()
    for more in (bias, residual):
        exact = exact if more is None else exact + more.double()
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-3)
    again = native.matmul(x, weight.t().contiguous(), bias, residual)
    torch.testing.assert_close(again.double(), exact, rtol=1e-4, atol=1e-3)


def attention() -> None:
    group, heads, time_, start = (random.randrange(1, n) for n in (4, 4, 9, 200))
    width = random.randrange(1, 80)
    q = view(2, group * heads, time_, width, dtype=random.choice(DTYPES))
    cache = torch.zeros(
        2,
        heads,
        start + time_ + random.randrange(-1, 3),
        width,
        dtype=random.choice([torch.float16, torch.float32]),
    )
    if not native.kv_append(cache, view(2, heads, time_, width, dtype=random.choice(DTYPES)), start):
        raise AssertionError("nothing here saturates")
    options = {"causal": random.random() < 0.8, "window": random.choice([None, 1, 30]), "start": start}
    result = native.attention(q, cache, cache, **options)
    exact = reference.attention(q.double(), cache.double(), cache.double(), **options)
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def rows() -> None:
    shape = (random.randrange(4), random.randrange(1, 6), random.randrange(2, 300))
    x, up = view(*shape, dtype=random.choice(DTYPES)), view(*shape, dtype=random.choice(DTYPES))
    for name, args in (("rms_norm", (x,)), ("layer_norm", (x,)), ("gated", (x, up, "silu"))):
        exact = getattr(reference, name)(*(a.double() if isinstance(a, Tensor) else a for a in args))
        torch.testing.assert_close(getattr(native, name)(*args).double(), exact, rtol=1e-3, atol=1e-3)


def packed_linear() -> None:
    """A product of packed numbers; in one case of four of a blob that somebody has written to."""
    rows, inner, outer = random.randrange(40), random.randrange(1, 300), random.randrange(1, 100)
    weight = torch.randn(outer, inner).bfloat16()
    weight.view(-1)[:: random.randrange(1, 200)] = 2.0**-90
    matrix = packed_native.pack(weight)
    begin = random.randrange(outer)
    part, used = matrix.narrow_rows(begin, outer - begin), weight[begin:].double()
    x = view(rows, inner + (random.random() < 0.03), dtype=random.choice(DTYPES))
    if random.random() < 0.25:
        places = torch.randint(matrix.nbytes - 16, matrix.nbytes, (8,)) if matrix.escapes else slice(0, 0)
        matrix.blob[places] = torch.randint(0, 256, (8,), dtype=torch.uint8)[: 8 if matrix.escapes else 0]
        packed_native.linear(x, part)
        packed_native.unpack(matrix)
        packed.check(matrix)
        return
    torch.testing.assert_close(packed_native.linear(x, part).double(), x.double() @ used.t(), rtol=1e-4, atol=1e-3)
    x = view(rows, outer - begin, dtype=torch.float32)
    torch.testing.assert_close(packed_native.linear(x, part.t()).double(), x.double() @ used, rtol=1e-4, atol=1e-3)


def main(seconds: float) -> None:
    """Prints how many calls agreed and how many were refused."""
    agreed = refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        native.set_isa(random.choice(native.info()["available"]))
        try:
            random.choice([linear, attention, rows, packed_linear])()
            agreed += 1
        except UpcastError:
            refused += 1
    print(f"fuzz: {agreed} agreed, {refused} refused")
    assert agreed
    assert refused


if __name__ == "__main__":
    main(float(sys.argv[1]))

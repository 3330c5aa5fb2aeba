"""Norms, gated activations, rope, cache and attention against float64 and their reference twins."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.measure import check
from upcast.core.errors import UpcastError
from upcast.kernels import native, reference

WIDTHS = [1, 7, 31, 64, 129, 1023]
BATCHES = [(0,), (1,), (2, 33)]


def layouts(*shape: int) -> list[Tensor]:
    """The same shape contiguous, as columns of something wider, and with no stride that walks its rows."""
    *batch, width = shape
    plain = torch.randn(*shape)
    wide = torch.randn(*batch, width + 5)[..., 3 : width + 3]
    crossed = torch.randn(*batch, 2 * width)[..., ::2]
    return [plain, wide, crossed]


def twin(name: str, *args: object, **options: object) -> None:
    """native.<name> against reference.<name> in float32 and in float64."""
    exact = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    ours = getattr(native, name)(*args, **options)
    theirs: Callable[..., Tensor] = getattr(reference, name)
    check(ours, theirs(*args, **options), theirs(*exact, **options))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_norms(isa: str, width: int, batch: tuple[int, ...]) -> None:
    weight, bias = torch.randn(width), torch.randn(width)
    for x in layouts(*batch, width):
        if width > 1:  # a single element minus its mean is zero, or rounding noise
            twin("layer_norm", x, weight, bias)
            twin("layer_norm", x, None, None, eps=1e-3)
        twin("rms_norm", x, weight)
        twin("rms_norm", x, None, eps=1e-6)
        twin("rms_norm", x, weight, unit_offset=True)


def test_norms_of_massive_and_special_rows(isa: str) -> None:
    x = torch.randn(6, 576)
    x[0, 3] = 24926.0
    x[1] += 1e4
    x[2, 5] = float("nan")
    x[3, 5] = float("inf")
    x[4] = 0.0
    weight, bias = torch.randn(576), torch.randn(576)
    for row in x.split(1):
        exact = reference.layer_norm(row.double(), weight.double(), bias.double())
        check(native.layer_norm(row, weight, bias), reference.layer_norm(row, weight, bias), exact, limit=1e-3)
        exact = reference.rms_norm(row.double(), weight.double())
        check(native.rms_norm(row, weight), reference.rms_norm(row, weight), exact)


ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_gated(isa: str, activation: str, batch: tuple[int, ...]) -> None:
    for width in WIDTHS:
        for gate, up in zip(layouts(*batch, width), layouts(*batch, width), strict=True):
            twin("gated", 3 * gate, up, activation)
    both = torch.randn(5, 2, 65)
    twin("gated", both[:, 0], both[:, 1], activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_range(isa: str, activation: str) -> None:
    """Relative error of every single value, where PyTorch cancels too: far into the negative tail."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 88.0, 200.0, 1e30])])
    wide = x.double()
    exact = {
        "silu": wide / (1 + torch.exp(-wide)),
        "gelu": 0.5 * wide * torch.erfc(-wide / 2**0.5),
        "gelu_tanh": wide / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))),
    }[activation]
    ours = native.gated(x, torch.ones_like(x), activation).double()
    # The exponential's argument is rounded to float32: its size bounds what can be asked for.
    argument = {"silu": wide.abs(), "gelu": wide**2, "gelu_tanh": wide.abs() + wide.abs() ** 3 / 10}[activation]
    assert ((ours - exact).abs() <= (5e-7 + 1.5e-7 * argument.clamp(max=200)) * exact.abs() + 1e-37).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_special_values(isa: str, activation: str) -> None:
    x = torch.tensor([float("nan"), -1e30, 1e30, -0.0, 1e-40])
    expected = reference.gated(x, torch.ones_like(x), activation)
    torch.testing.assert_close(native.gated(x, torch.ones_like(x), activation), expected, equal_nan=True)
    infinite = torch.tensor([float("inf")])  # some builds of PyTorch make a NaN of gelu's infinity
    assert torch.equal(native.gated(infinite, torch.ones(1), activation), infinite)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(64, 64), (64, 16), (33, 14), (8, 2), (5, 0)])
def test_rope(isa: str, width: int, turned: int, interleaved: bool) -> None:
    for batch, heads, time in [(1, 1, 1), (2, 3, 7), (1, 9, 130), (0, 2, 3)]:
        fused = torch.randn(batch, time, heads + 2, width)[:, :, 1:-1].transpose(1, 2)
        for x in (fused, fused.contiguous(), fused.transpose(2, 3).contiguous().transpose(2, 3)):
            for shape in ((time, turned), (batch, time, turned), (1, time, turned)):
                angles = torch.randn(shape)
                twin("rope", x, angles.cos(), angles.sin(), interleaved)


ATTENTION = [  # batch, query heads, cache heads, new queries, start, cache length, width, value width
    (1, 1, 1, 1, 0, 1, 64, 64),
    (1, 9, 3, 1, 128, 200, 64, 64),
    (1, 9, 3, 1, 1900, 2048, 64, 64),
    (2, 4, 4, 7, 33, 64, 31, 33),
    (2, 8, 2, 129, 0, 129, 32, 32),
    (1, 6, 1, 33, 600, 700, 80, 48),
    (1, 2, 2, 0, 5, 9, 16, 16),
]
OPTIONS = [
    {},
    {"causal": False},
    {"window": 17},
    {"softcap": 5.0, "scale": 1.0},
    {"window": 1000, "softcap": 30.0, "scale": 0.3},
]


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, kv_heads, time, start, length, width, value_width = shape
    q = torch.randn(batch, time, heads, width).transpose(1, 2)
    k = torch.randn(batch, kv_heads, length, width).to(dtype)
    v = torch.randn(batch, kv_heads, length, value_width).to(dtype)
    k[:, :, start + time :] = float("nan")  # positions nobody wrote are not read
    v[:, :, start + time :] = float("nan")
    for options, threads in itertools.product(OPTIONS, (1, 2)):
        torch.set_num_threads(threads)
        exact = reference.attention(q.double(), k.double(), v.double(), start=start, **options)
        theirs = reference.attention(q, k, v, start=start, **options)
        check(native.attention(q, k, v, start=start, **options), theirs, exact)
    torch.set_num_threads(2)


def test_attention_with_massive_scores(isa: str) -> None:
    q, k, v = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 700, 64) * 300, torch.randn(1, 2, 700, 64)
    exact = reference.attention(q.double(), k.double(), v.double(), start=600)
    check(native.attention(q, k, v, start=600), reference.attention(q, k, v, start=600), exact, limit=1e-3)


def test_attention_passes_nan_on(isa: str) -> None:
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    q[0, 0, 1, 3] = float("nan")
    out = native.attention(q, k, v, start=2)
    assert out[0, 0, 0].isfinite().all()
    assert out[0, 0, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kv_append(isa: str, dtype: torch.dtype) -> None:
    for batch, heads, time, start, width in [
        (1, 1, 1, 0, 64),
        (2, 3, 7, 5, 33),
        (1, 9, 200, 11, 64),
        (1, 2, 0, 3, 8),
    ]:
        new = torch.randn(batch, time, heads, width).transpose(1, 2) * 100
        cache = torch.full((batch, heads, 256, width), -1.0, dtype=dtype)
        expected = cache.clone()
        assert reference.kv_append(expected, new, start)
        assert native.kv_append(cache, new, start)
        assert torch.equal(cache, expected)


SATURATION = [(65519.0, True), (65520.0, False), (-65520.0, False), (1e30, False), (float("inf"), True)]


@pytest.mark.parametrize(("value", "fits"), [*SATURATION, (float("nan"), True)])
@pytest.mark.parametrize("place", [0, 16, 32])
def test_kv_append_saturation(isa: str, value: float, fits: bool, place: int) -> None:
    for rows in (1, 3000):
        new = torch.randn(1, 2, rows, 33)
        new[0, 1, rows - 1, place] = value
        cache = torch.zeros(1, 2, rows + 1, 33, dtype=torch.float16)
        expected = torch.zeros_like(cache)
        assert reference.kv_append(expected, new, 1) is fits
        assert native.kv_append(cache, new, 1) is fits
        assert torch.equal(cache.nan_to_num(1.0, 2.0, 3.0), expected.nan_to_num(1.0, 2.0, 3.0))


@pytest.mark.parametrize("layout", ["heads first", "positions first"])
@pytest.mark.parametrize(("size", "fits"), [(3.99, True), (4.01, False), (9000.0, False), (float("nan"), True)])
def test_kv_append_within_a_limit(isa: str, size: float, fits: bool, layout: str) -> None:
    for batch, heads, time, width in [(1, 1, 1, 64), (2, 3, 7, 33), (1, 9, 700, 5)]:
        for at in (0, time - 1):
            new = torch.randn(batch, time, heads, width).clamp(-2, 2).transpose(1, 2)
            row = torch.randn(heads, width)
            new[-1, :, at] = row * (size / row.square().mean().sqrt())
            new = new.contiguous() if layout == "heads first" else new
            for dtype in (torch.float16, torch.float32):
                cache = torch.zeros(batch, heads, time + 3, width, dtype=dtype)
                expected = cache.clone()
                taken = fits or dtype == torch.float32
                assert reference.kv_append(expected, new, 2, 4.0) is taken
                assert native.kv_append(cache, new, 2, 4.0) is taken
                assert torch.equal(cache.nan_to_num(9.0), expected.nan_to_num(9.0))
                assert bool(cache.any()) is taken
                assert native.kv_append(cache, new, 2)


def test_every_float_is_rounded_to_half_as_torch_does(isa: str) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1, 1, 1000, 77), dtype=torch.int64).to(torch.int32)
    new = bits.view(torch.float32).clone()
    near = torch.randint(0, 2**15, (1, 1, 1000, 77)).to(torch.int16).view(torch.float16).float()
    for values in (new.where(new.abs() < 65520, 0.0), near.where(near.isfinite(), 0.0) * (1 + 2.0**-11)):
        cache = torch.empty(1, 1, 1000, 77, dtype=torch.float16)
        if native.kv_append(cache, values, 0):
            assert torch.equal(cache, values.half())
        else:
            assert (values.half().isinf()).any()


Q, K = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 9, 8)
REFUSED = {
    "norm of float16": lambda: native.rms_norm(Q.half()),
    "weight too short": lambda: native.rms_norm(Q, torch.randn(7)),
    "bias is float64": lambda: native.layer_norm(Q, torch.randn(8), torch.randn(8).double()),
    "norm of a scalar": lambda: native.rms_norm(torch.tensor(1.0)),
    "unknown activation": lambda: native.gated(Q, Q, "relu"),
    "up too short": lambda: native.gated(Q, Q[..., :7], "silu"),
    "rope of 3-D": lambda: native.rope(Q[0], torch.randn(3, 8), torch.randn(3, 8)),
    "rope of too many": lambda: native.rope(Q, torch.randn(3, 10), torch.randn(3, 10)),
    "rope of an odd number": lambda: native.rope(Q, torch.randn(3, 7), torch.randn(3, 7)),
    "rope for other times": lambda: native.rope(Q, torch.randn(4, 8), torch.randn(4, 8)),
    "rope sin differs": lambda: native.rope(Q, torch.randn(3, 8), torch.randn(3, 6)),
    "cache too short": lambda: native.attention(Q, K, K, start=7),
    "start negative": lambda: native.attention(Q, K, K, start=-1),
    "start overflows": lambda: native.attention(Q, K, K, start=2**63 - 1),
    "k and v differ in dtype": lambda: native.attention(Q, K, K.half(), start=0),
    "heads do not divide": lambda: native.attention(
        torch.randn(1, 3, 1, 8), torch.cat([K, K], 1), torch.cat([K, K], 1), start=0
    ),
    "widths differ": lambda: native.attention(Q[..., :7], K, K, start=0),
    "batches differ": lambda: native.attention(Q, torch.cat([K, K]), torch.cat([K, K]), start=0),
    "window negative": lambda: native.attention(Q, K, K, start=0, window=-3),
    "append beyond the end": lambda: native.kv_append(K, Q[:, :1], 7),
    "append before the start": lambda: native.kv_append(K, Q[:, :1], -1),
    "append other heads": lambda: native.kv_append(K, Q, 0),
    "append float16": lambda: native.kv_append(K, Q[:, :1].half(), 0),
    "append to float64": lambda: native.kv_append(K.double(), Q[:, :1], 0),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refusals(call: Callable[[], object]) -> None:
    with pytest.raises(UpcastError):
        call()

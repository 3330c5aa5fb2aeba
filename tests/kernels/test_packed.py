"""Packed matrices: every bit kept, native equal to the twin, products equal to those of float16 where it holds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.example_block import changed, example
from tests.kernels.measure import check
from upcast import kernels
from upcast.core.errors import UpcastError
from upcast.kernels import native, packed, packed_native, packed_portable, tuning
from upcast.kernels.block_spec import STORAGES, BlockSpec, Matrix
from upcast.kernels.packed import PackedMatrix
from upcast.kernels.packed_matrix import layout
from upcast.kernels.tuning import READINGS, Tuning

pytestmark = pytest.mark.skipif(not native.available(), reason="native kernels")

BOTH = pytest.mark.parametrize("twin", [packed_native, packed_portable], ids=["native", "portable"])
SHAPES = [
    (1, 1),
    (1, 64),
    (3, 5),
    (7, 63),
    (5, 65),
    (37, 130),
    (64, 1023),
    (2, 3, 70),
    (9,),
    (),
    (0, 5),
    (5, 0),
    (0, 0),
]
ROWS = [1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 33]
PRODUCTS = [(1, 1), (7, 31), (33, 129), (130, 576), (20, 4500)]
ODD = [0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7FC0, 0x7FA1, 0xFFFF, 0x4800, 0x7F61, 0xFF7F]
"""-0.0, subnormals, infinities, NaNs with payloads, 65504 * 2 and numbers of about 3e38."""


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


def any_bits(*shape: int) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).mul(0.03).bfloat16()


def odd(*shape: int) -> Tensor:
    """Numbers of a model, with others among them."""
    x = normal(*shape)
    flat = bits(x).view(-1)
    flat[::29] = torch.tensor(ODD).to(torch.int16).repeat(len(flat) // 12 + 1)[: len(flat[::29])]
    return flat.view(torch.bfloat16).view(shape)


def of_both(rows: int, columns: int) -> Tensor:
    """Numbers that float16 and bfloat16 hold, some of which escape."""
    x = normal(rows, columns)
    x.view(-1)[::61] = 2.0**-14
    x.view(-1)[::7] = 0.0
    return torch.where(x.float().half().float() == x.float(), x, 0)


KINDS = {"any bits": any_bits, "of a model": normal, "odd": odd, "zeros": lambda *shape: torch.zeros(shape).bfloat16()}


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_comes_back(twin: type[packed_native], kind: str, shape: tuple[int, ...]) -> None:
    x = KINDS[kind](*shape)
    matrix = twin.pack(x)
    packed.check(matrix)
    assert matrix.nbytes == packed.size_of(matrix.rows, matrix.columns, matrix.escapes)
    back = twin.unpack(matrix)
    assert back.shape == matrix.shape
    assert torch.equal(bits(back).view(-1), bits(x).view(-1))
    wide = torch.empty(matrix.shape)
    assert twin.unpack(matrix, wide) is wide
    assert torch.equal(wide.view(torch.int32), back.float().view(torch.int32)) or back.isnan().any()
    assert twin.unpack(matrix.t()).shape == matrix.t().shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1000)], ids=str)
def test_the_twins_pack_the_same_bytes(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    x = KINDS[kind](*shape)
    born = packed_native.examine(x)
    assert born == packed_portable.examine(x)
    want = packed_portable.pack(x, born)
    got = packed_native.pack(x, born)
    assert got[1:] == want[1:]
    assert torch.equal(got.blob, want.blob)
    assert torch.equal(
        packed_native.pack(x.view(torch.int16).int().bitwise_left_shift(16).view(torch.float32)).blob, want.blob
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 150), st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40))
def test_any_numbers_come_back(rows: int, columns: int, values: list[int]) -> None:
    flat = torch.tensor(values, dtype=torch.int32).to(torch.int16).repeat(rows * columns // len(values) + 1)
    x = flat[: rows * columns].view(rows, columns).view(torch.bfloat16)
    matrix = packed.pack(x)
    packed.check(matrix)
    assert torch.equal(bits(packed.unpack(matrix)), bits(x))
    assert torch.equal(packed_portable.pack(x).blob, matrix.blob)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_numbers_of_more_digits_are_not_packed(twin: type[packed_native], dtype: torch.dtype) -> None:
    x = torch.ones(7, 33, dtype=dtype)
    assert twin.examine(x).exact
    assert torch.equal(twin.unpack(twin.pack(x)).to(dtype), x)
    x[5, 3] += 2.0**-9
    born = twin.examine(x)
    assert not born.exact
    with pytest.raises(UpcastError, match="more digits than bfloat16"):
        twin.pack(x)
    with pytest.raises(UpcastError, match="more digits than bfloat16"):
        twin.pack(x, born._replace(exact=True))


@BOTH
def test_what_does_not_fit_is_refused(twin: type[packed_native]) -> None:
    x = any_bits(5, 70)
    born = twin.examine(x)
    with pytest.raises(UpcastError, match="not those that were examined"):
        twin.pack(torch.zeros(5, 70).bfloat16(), born)
    with pytest.raises(UpcastError, match="contiguous uint8"):
        twin.pack(x, born, torch.empty(11, dtype=torch.uint8))
    out = torch.empty(packed.size_of(5, 70, born.escapes), dtype=torch.uint8)
    assert twin.pack(x, born, out).blob is out


def test_the_table_has_the_most_frequent_bytes_first() -> None:
    high = torch.cat([torch.full((count,), byte) for byte, count in ((0x3C, 9), (0xBC, 9), (0x3B, 30), (0x00, 4))])
    x = torch.cat([(high << 8 | 1), torch.zeros(500)]).to(torch.int16).view(torch.bfloat16)
    assert packed.examine(x) == packed.Born(True, 0, bytes([0, 0x3B, 0x3C, 0xBC, 0]).ljust(16, b"\0"))


DAMAGES = {
    "bytes": (lambda m, at: m._replace(blob=m.blob[:-1]), "bytes"),
    "rows": (lambda m, at: m._replace(rows=m.rows + 1), "bytes"),
    "escapes": (lambda m, at: m._replace(escapes=-1), "a packed matrix has"),
    "use": (lambda m, at: m._replace(begin=3), "rows"),
    "table": (lambda m, at: _set(m, at.table, 7), "head of its table"),
    "pointers": (lambda m, at: _set(m, at.pointers, 1), "row pointers"),
    "order of rows": (lambda m, at: _set(m, at.pointers + 7, 255), "row pointers"),
    "outside": (lambda m, at: _set(m, at.columns, 200), "column 200 of 70"),
    "order": (lambda m, at: _set(m, at.columns + 4, 0), "columns of escapes"),
}


def _set(matrix: PackedMatrix, at: int, value: int) -> PackedMatrix:
    matrix.blob[at] = value
    return matrix


@BOTH
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob_is_refused_and_harmless(twin: type[packed_native], damage: str) -> None:
    matrix = packed_portable.pack(any_bits(5, 70))
    change, message = DAMAGES[damage]
    matrix = change(matrix, layout(*matrix[1:4]))
    with pytest.raises(UpcastError, match=message):
        twin.check(matrix)
    if damage in ("table", "pointers", "order of rows", "outside", "order"):
        packed_native.linear(torch.ones(3, 70), matrix)
        packed_native.linear(torch.ones(3, 5), matrix.t())
        packed_native.unpack(matrix)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_are_those_of_float16_bit_for_bit(isa: str, shape: tuple[int, int]) -> None:
    weight, bias = of_both(*shape), torch.randn(shape[0])
    matrix, half = packed_native.pack(weight), weight.half()
    try:
        for rows in ROWS:
            x, residual = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
            want = native.linear(x, half, bias, residual)
            for reading in READINGS:
                tuning.use(Tuning(reading, 0))
                assert torch.equal(packed_native.linear(x, matrix, bias, residual), want), (reading, rows)
    finally:
        tuning.use(None)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_every_number_of_rows(isa: str, shape: tuple[int, int]) -> None:
    weight = odd(*shape)
    weight = torch.where(weight.float().abs() < 2, weight, 1)
    matrix = packed_native.pack(weight)
    for rows in (1, 2, 9, 40):
        for stored, right in ((matrix, weight.t()), (matrix.t(), weight)):
            x, bias, residual = (
                torch.randn(rows, len(right)),
                torch.randn(right.shape[1]),
                torch.randn(rows, right.shape[1]),
            )
            exact = x.double() @ right.double() + bias + residual
            check(packed_native.linear(x, stored, bias, residual), x @ right.float() + bias + residual, exact)
            check(packed_portable.linear(x, stored, bias, residual), x @ right.float() + bias + residual, exact)


def test_a_row_does_not_depend_on_its_batch_and_on_threads(isa: str) -> None:
    matrix = packed_native.pack(odd(130, 576).nan_to_num(0, 1, 1))
    x = torch.randn(16, 576)
    alone = torch.cat([packed_native.linear(x[i : i + 1], matrix) for i in range(len(x))])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in range(1, 17):
                torch.testing.assert_close(
                    packed_native.linear(x[:rows], matrix), alone[:rows], rtol=0, atol=0, equal_nan=True
                )
    finally:
        torch.set_num_threads(before)


def test_infinities_and_nans_reach_the_sums(isa: str) -> None:
    weight = torch.full((4, 100), 0.5).bfloat16()
    weight[0, 3], weight[1, 99], weight[2, 70] = float("inf"), float("nan"), 3e38
    got = packed_native.linear(torch.ones(1, 100), packed_native.pack(weight))
    torch.testing.assert_close(got, weight.float().sum(1)[None], equal_nan=True)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty(isa: str, rows: int, inner: int, outer: int) -> None:
    matrix, x, bias = packed.pack(normal(outer, inner)), torch.randn(rows, inner), torch.randn(outer)
    want = x @ packed.unpack(matrix).float().t() + bias
    torch.testing.assert_close(packed_native.linear(x, matrix, bias), want)
    torch.testing.assert_close(packed_portable.linear(x, matrix, bias), want)


@BOTH
def test_leading_dimensions_strides_and_rows_in_use(twin: type[packed_native], isa: str) -> None:
    weight = odd(60, 33).nan_to_num(0, 1, 1).clamp(-1, 1)
    matrix, part = packed.pack(weight), weight[10:27].float()
    narrow = matrix.narrow_rows(5, 40).narrow_rows(5, 17)
    for x in (torch.randn(2, 3, 33), torch.randn(33), torch.randn(33, 4).t(), torch.randn(2, 0, 33)):
        torch.testing.assert_close(twin.linear(x, narrow), x @ part.t(), rtol=1e-5, atol=1e-5)
        residual = torch.randn(17, *x.shape[:-1]).movedim(0, -1)
        torch.testing.assert_close(
            twin.linear(x, narrow, None, residual), x @ part.t() + residual, rtol=1e-5, atol=1e-5
        )
    x = torch.randn(3, 17)
    torch.testing.assert_close(twin.linear(x, narrow.t()), x @ part, rtol=1e-5, atol=1e-5)
    with pytest.raises(IndexError, match="rows 3 to 21 of a packed matrix that has 17"):
        narrow.narrow_rows(3, 18)


@BOTH
def test_embedding(twin: type[packed_native], isa: str) -> None:
    weight = odd(50, 90)
    matrix = packed.pack(weight).narrow_rows(10, 30)
    indices = torch.randint(0, 30, (4, 5))
    torch.testing.assert_close(
        twin.embedding(indices, matrix), weight[indices + 10].float(), rtol=0, atol=0, equal_nan=True
    )
    assert twin.embedding(indices.int()[:0], matrix).shape == (0, 5, 90)
    for wrong in (-1, 30):
        with pytest.raises(IndexError, match=f"index {wrong} is out of range for an embedding of 30 rows"):
            twin.embedding(torch.tensor([0, wrong]), matrix)


@BOTH
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 0], [0, 40, 2, 0]], ids=str)
def test_experts(twin: type[packed_native], isa: str, counts: list[int]) -> None:
    weight = odd(4, 20, 70).nan_to_num(0, 1, 1).clamp(-1, 1)
    matrix, rows = packed.pack(weight), torch.tensor(counts)
    for transposed in (False, True):
        x = torch.randn(sum(counts), 20 if transposed else 70)
        parts = [part @ (w if transposed else w.t()) for part, w in zip(x.split(counts), weight.float(), strict=True)]
        got = twin.grouped_linear(x, matrix, rows, 4, transposed)
        torch.testing.assert_close(got, torch.cat(parts), rtol=1e-5, atol=1e-5)


def with_numbers_of_both(spec: BlockSpec) -> tuple[BlockSpec, BlockSpec]:
    """The block with matrices in float16, and with the same ones packed."""
    half, narrow = {}, {}
    for name in ("qkv", "key", "value", "proj", "gate", "up", "down"):
        matrix = getattr(spec, name)
        if matrix.weight is None:
            continue
        weight = matrix.weight.bfloat16()
        half[name] = matrix._replace(weight=weight.half())
        narrow[name] = matrix._replace(weight=packed.pack(weight.half()), storage=STORAGES["packed"])
    return spec._replace(**half), spec._replace(**narrow)


@pytest.mark.parametrize("last", [None, 1])
@pytest.mark.parametrize("spec", [example()[-1], changed(), changed(split=True)], ids=["plain", "changed", "split"])
def test_a_block_of_packed_matrices(isa: str, spec: BlockSpec, last: int | None) -> None:
    x, cos, sin, _ = example()
    half, narrow = with_numbers_of_both(spec)
    want, got = (native.block(x, cos, sin, None, None, each, last=last) for each in (half, narrow))
    assert want is not None
    assert got is not None
    assert torch.equal(got, want)


def test_a_block_refuses_what_is_no_packed_matrix() -> None:
    x, cos, sin, spec = example()
    matrix = packed.pack(torch.zeros(spec.down.weight.shape).bfloat16())  # type: ignore[union-attr]
    for weight in (matrix.t(), matrix._replace(rows=3), spec.down.weight, None):
        with pytest.raises(UpcastError):
            native.block(x, cos, sin, None, None, spec._replace(down=Matrix(weight, None, STORAGES["packed"])))


def test_the_choice_of_kernels_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for twin in (packed_native, packed_portable):
        monkeypatch.setattr(twin, "linear", lambda *args, twin=twin: calls.append(twin))
    for implementation in (native, kernels.portable):
        monkeypatch.setattr(kernels, "_active", implementation)
        packed.linear(torch.ones(1, 3), packed.pack(normal(2, 3)))
    assert calls == [packed_native, packed_portable]

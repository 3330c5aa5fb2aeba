"""linear, matmul, embedding and grouped_linear against float64, on every level of this machine."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.measure import check
from upcast.core.errors import UpcastError
from upcast.kernels import native, native_library

SHAPES = [(1, 1), (1, 33), (7, 31), (31, 7), (33, 129), (129, 33), (64, 1023), (1023, 31), (257, 576)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 16, 17, 24, 31, 33, 64, 129]
BATCHES = [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 4)]
EXTREMES = [2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 65504.0, -65504.0, 0.0, -0.0]
SPECIAL = [float("inf"), -float("inf"), float("nan")]


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x W^T + bias + residual in x's dtype."""
    out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return out if residual is None else out + residual.to(x.dtype)


def check_both(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None:
    """linear with the weight and matmul with its transpose."""
    exact, reference = product(x.double(), weight, bias, residual), product(x, weight, bias, residual)
    check(native.linear(x, weight, bias, residual), reference, exact)
    check(native.matmul(x, weight.t().contiguous(), bias, residual), reference, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_rows(isa: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).half()
    bias = torch.randn(shape[0])
    for rows in ROWS:
        x, residual = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
        check_both(x, weight)
        check_both(x, weight, bias, residual)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_large(isa: str, rows: int) -> None:
    weight = torch.randn(1000, 4096).half()
    check_both(torch.randn(rows, 4096), weight, torch.randn(1000), torch.randn(rows, 1000))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_leading_dimensions(isa: str, batch: tuple[int, ...]) -> None:
    x, weight = torch.randn(*batch, 33), torch.randn(17, 33).half()
    assert native.linear(x, weight).shape == (*batch, 17)
    check_both(x, weight, torch.randn(17), torch.randn(*batch, 17))


@pytest.mark.parametrize(("rows", "inner", "outer"), list(itertools.product([0, 3], [0, 5], [0, 4])))
def test_empty(isa: str, rows: int, inner: int, outer: int) -> None:
    x, weight, bias = torch.randn(rows, inner), torch.randn(outer, inner).half(), torch.randn(outer)
    expected = product(x, weight, bias, None)
    torch.testing.assert_close(native.linear(x, weight, bias), expected)
    torch.testing.assert_close(native.matmul(x, weight.t().contiguous(), bias), expected)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_strides(isa: str, rows: int) -> None:
    weight = torch.randn(65, 90).half()[:, 1:82]  # misaligned by two bytes, rows apart
    assert weight.data_ptr() % 4 == 2
    bias = torch.randn(65)
    layouts = [
        torch.randn(rows, 100)[:, 3:84],
        torch.randn(81, rows).t(),
        torch.randn(rows, 162)[:, ::2],
        torch.randn(1, 81).expand(rows, 81),
    ]
    for x in layouts:
        residual = torch.randn(65, rows).t()
        exact, reference = product(x.double(), weight, bias, residual), product(x, weight, bias, residual)
        check(native.linear(x, weight, bias, residual), reference, exact)
        columns = torch.randn(83, 90).half()[1:82, 1:66]
        check(native.matmul(x, columns), x @ columns.float(), x.double() @ columns.double())
    x = torch.randn(3, rows, 2, 81).transpose(0, 2)  # no single stride walks its rows
    check_both(x, weight)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_extreme_weights(isa: str, rows: int) -> None:
    weight = torch.tensor(EXTREMES).repeat(19)[: 18 * 7].reshape(18, 7).half()
    x = torch.randn(rows, 7)
    check_both(x, weight)
    tiny = torch.full((40, 70), 2.0**-24).half()
    assert native.linear(torch.ones(rows, 70), tiny).eq(70 * 2.0**-24).all()
    assert native.matmul(torch.ones(rows, 40), tiny).eq(40 * 2.0**-24).all()


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_special_values_propagate(isa: str, rows: int, value: float) -> None:
    for place in (0, 16, 34):
        x, weight = torch.randn(rows, 35), torch.randn(33, 35).half()
        weight[5, place] = value
        check_both(x, weight)
        x[0, place] = value
        check_both(x, weight)
        x[0, place] = 0.0  # zero times infinity is NaN
        check_both(x, weight)


@pytest.mark.parametrize("rows", [1, 7, 33, 70])
def test_rows_of_any_size_keep_their_own_accuracy(isa: str, rows: int) -> None:
    """Each row is judged alone: splitting numbers into pieces must not lose the small ones among large ones."""
    x, weight = torch.randn(rows, 129), torch.randn(48, 129).half()
    for row, scale in enumerate([1.0, 2.0**-60, 2.0**-100, 2.0**80, 0.0]):
        if row < rows:
            x[row] *= scale
    results = native.linear(x, weight), native.matmul(x, weight.t().contiguous())
    for result in results:
        for row in range(rows):
            check(result[row], F.linear(x[row], weight.float()), F.linear(x[row].double(), weight.double()))


def test_every_half_is_widened_exactly(isa: str) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(256, 256)
    upcast = native.embedding(torch.arange(256), halves)
    assert torch.equal(upcast.isnan(), halves.isnan())
    assert torch.equal(upcast.nan_to_num(0.0), halves.float().nan_to_num(0.0))


def test_residual_is_added_after_the_sum(isa: str) -> None:
    """Started from a massive residual, a sum of small products would vanish in it step by step."""
    x, weight = torch.full((1, 4096), 2.0**-6), torch.full((8, 4096), 2.0**-6).half()
    residual = torch.full((1, 8), 2.0**23)
    assert native.linear(x, weight, None, residual).eq(2.0**23 + 1).all()
    assert native.matmul(x, weight.t().contiguous(), None, residual).eq(2.0**23 + 1).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (300, 5)], ids=str)
def test_embedding(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    table = torch.randn(129, 77).half()[:, 3:]
    indices = torch.randint(0, 129, shape, dtype=dtype)
    assert torch.equal(native.embedding(indices, table), F.embedding(indices, table.float()))
    assert torch.equal(native.embedding(indices.t(), table), F.embedding(indices.t(), table.float()))


@pytest.mark.parametrize("index", [-1, 5, 2**40])
def test_embedding_refuses_indices_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        native.embedding(torch.tensor([0, index]), torch.randn(5, 3).half())


COUNTS = [[], [0, 0], [3], [1, 0, 17, 2], [0, 5, 0, 0, 1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped(isa: str, counts: list[int], transposed: bool) -> None:
    x, weight = torch.randn(sum(counts), 33), torch.randn(len(counts), 65, 33).half()
    for expert, count in enumerate(counts):
        if count == 0:
            weight[expert] = float("nan")  # an expert without rows is not read
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    result = native.grouped_linear(x, stored, torch.tensor(counts, dtype=torch.int64), transposed)
    assert result.shape == (sum(counts), 65)
    start = 0
    for expert, count in enumerate(counts):
        rows = x[start : start + count]
        if count:
            exact = rows.double() @ weight[expert].double().t()
            check(result[start : start + count], rows @ weight[expert].float().t(), exact)
        start += count


X, W = torch.randn(3, 8), torch.randn(5, 8).half()
REFUSED = {
    "x is float64": lambda: native.linear(X.double(), W),
    "x is float16": lambda: native.linear(X.half(), W),
    "weight is float32": lambda: native.linear(X, W.float()),
    "weight is 1-D": lambda: native.linear(X, W[0]),
    "features differ": lambda: native.linear(X[:, :7], W),
    "weight is transposed": lambda: native.linear(torch.randn(3, 5), W.t()),
    "weight rows overlap": lambda: native.linear(X, W.flatten()[:8].expand(5, 8)),
    "bias too long": lambda: native.linear(X, W, torch.randn(6)),
    "bias is float16": lambda: native.linear(X, W, torch.randn(5).half()),
    "bias is strided": lambda: native.linear(X, W, torch.randn(10)[::2]),
    "residual too short": lambda: native.linear(X, W, None, torch.randn(2, 5)),
    "residual too narrow": lambda: native.linear(X, W, None, torch.randn(3, 4)),
    "x is 0-D": lambda: native.linear(torch.tensor(1.0), W),
    "matmul features differ": lambda: native.matmul(X, W),
    "indices are float": lambda: native.embedding(X, W),
    "table is float32": lambda: native.embedding(torch.tensor([0]), W.float()),
    "counts too large": lambda: native.grouped_linear(X, W[None], torch.tensor([4])),
    "counts too small": lambda: native.grouped_linear(X, W[None], torch.tensor([2])),
    "counts negative": lambda: native.grouped_linear(X, torch.stack([W, W]), torch.tensor([4, -1])),
    "counts overflow": lambda: native.grouped_linear(X, torch.stack([W, W]), torch.tensor([2**62, 2**62])),
    "counts do not fit": lambda: native.grouped_linear(X, W[None], torch.tensor([1, 2])),
    "counts are int32": lambda: native.grouped_linear(X, W[None], torch.tensor([3], dtype=torch.int32)),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refusals(call: object) -> None:
    with pytest.raises(UpcastError):
        call()


def test_tensors_without_memory_are_refused() -> None:
    with pytest.raises((UpcastError, TypeError)):
        native.linear(X.to("meta"), W)
    with pytest.raises((UpcastError, TypeError)):
        native.linear(X, W.to("meta"))
    with pytest.raises(TypeError):
        native._native.linear(X, [1.0], W, None, None, False, 1)
    with pytest.raises(UpcastError):
        native._native.linear(torch.empty(3, 4), X, W, None, None, False, 1)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_without_the_exchange_interface(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Older torch has none: tensors then come as tuples of address, dtype, device, shape and strides."""
    weight, bias = torch.randn(65, 33).half(), torch.randn(65)
    layouts = [torch.randn(rows, 33), torch.randn(33, rows).t()]
    expected = [native.linear(x, weight, bias) for x in layouts]
    assert native.info()["exchange"] == "dlpack"
    monkeypatch.setattr(native, "_exchange", False)
    monkeypatch.setattr(native_library, "exchange", False)
    assert native.info()["exchange"] == "data_ptr"
    for x, y in zip(layouts, expected, strict=True):
        assert torch.equal(native.linear(x, weight, bias), y)
    for call in REFUSED.values():
        with pytest.raises(UpcastError):
            call()


def test_without_the_exchange_interface_temporaries_stay_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_exchange", False)
    weight = torch.arange(997 * 8).view(997, 8).half()
    indices = torch.arange(4 * 900).view(900, 4).remainder(997)[:, 1]  # a slice with gaps is copied on the way
    assert torch.equal(native.embedding(indices, weight), weight[indices].float())

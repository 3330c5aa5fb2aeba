"""HalfWeight is float32 to everyone who looks: every operation gives what the upcast weight gives."""

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error
from upcast.tensor.half_weight import HalfWeight, parameter
from upcast.tensor.store import Fallbacks

pytestmark = pytest.mark.usefixtures("each_kernels")

torch.manual_seed(0)
X = torch.randn(2, 7, 33)
STRIDED = torch.randn(33, 7).t()
TOKENS = torch.randn(7, 32)
IDS = torch.tensor([[0, 5, 128], [1, 1, 7]])
OFFSETS = torch.tensor([2, 2, 7], dtype=torch.int32)

# name, shape of the weight, operation; none of these may upcast the weight whole
HANDLED: list[tuple[str, tuple[int, ...], Callable[[Tensor], Tensor]]] = [
    ("linear", (129, 33), lambda w: F.linear(X, w)),
    ("linear with bias", (129, 33), lambda w: F.linear(X, w, torch.ones(129))),
    ("linear of a row", (129, 33), lambda w: F.linear(X[0, 0], w)),
    ("linear of nothing", (129, 33), lambda w: F.linear(X[:0], w)),
    ("linear of strided input", (129, 33), lambda w: F.linear(STRIDED, w)),
    ("linear of a slice", (129, 33), lambda w: F.linear(X, w[3:31])),
    ("linear of strided rows", (129, 33), lambda w: F.linear(X, w[::2])),
    ("matmul with .T", (129, 33), lambda w: X @ w.T),
    ("matmul with .mT", (129, 33), lambda w: torch.matmul(X, w.mT)),
    ("matmul with t()", (129, 33), lambda w: X @ w.t()),
    ("matmul, weight first", (31, 33), lambda w: w @ X.mT),
    ("matmul, weight first, matrix", (31, 33), lambda w: w @ X[0].T),
    ("weight times vector", (129, 33), lambda w: w @ X[0, 0]),
    ("rmatmul", (33, 129), X.__matmul__),
    ("mm", (33, 129), lambda w: torch.mm(X[0], w)),
    ("mv", (129, 33), lambda w: torch.mv(w, X[0, 0])),
    ("bmm", (2, 33, 31), lambda w: torch.bmm(X, w)),
    ("batched matmul that broadcasts", (3, 1, 33, 31), lambda w: X @ w),
    ("batched, weight first", (2, 31, 33), lambda w: w @ X.mT),
    ("batched, vector", (2, 31, 33), lambda w: w @ X[0, 0]),
    ("addmm", (33, 129), lambda w: torch.addmm(torch.ones(129), X[0], w)),
    ("addmm with alpha and beta", (33, 129), lambda w: torch.addmm(torch.ones(129), X[0], w, beta=0.5, alpha=2)),
    ("baddbmm", (2, 33, 31), lambda w: torch.baddbmm(torch.ones(2, 7, 31), X, w, beta=0.5)),
    ("einsum", (31, 33), lambda w: torch.einsum("btk,nk->btn", X, w)),
    ("einsum with heads", (3, 31, 33), lambda w: torch.einsum("btk,hdk->bhtd", X, w)),
    ("embedding", (129, 31), lambda w: F.embedding(IDS, w)),
    ("embedding with padding", (129, 31), lambda w: F.embedding(IDS, w, padding_idx=1)),
    ("rows by index", (129, 31), lambda w: w[IDS]),
    ("index_select", (129, 31), lambda w: torch.index_select(w, 0, IDS[0])),
    ("gather", (129, 31), lambda w: torch.gather(w, 0, IDS)),
    ("conv1d", (31, 7, 3), lambda w: F.conv1d(X, w, torch.ones(31), padding=1)),
    ("conv2d", (5, 2, 3, 3), lambda w: F.conv2d(X[None], w, stride=2)),
    ("conv2d of channels last", (5, 2, 3, 3), lambda w: F.conv2d(X[None].to(memory_format=torch.channels_last), w)),
    ("grouped conv1d", (7, 1, 3), lambda w: F.conv1d(X, w, groups=7)),
    ("conv_transpose1d", (7, 31, 3), lambda w: F.conv_transpose1d(X, w, torch.ones(31))),
    ("grouped conv_transpose1d", (7, 3, 3), lambda w: F.conv_transpose1d(X, w, torch.ones(21), groups=7)),
    ("baddbmm by name", (2, 33, 5), lambda w: torch.ones(2, 7, 5).baddbmm(batch1=X, batch2=w, beta=0.5)),
    ("mul", (129, 33), lambda w: w * 2),
    ("add of a row", (129, 33), lambda w: torch.ones(33) + w),
    ("sub from a column", (129, 33), lambda w: torch.ones(129, 1) - w),
    ("add with alpha", (129, 33), lambda w: torch.add(torch.ones(2, 129, 33), w, alpha=3)),
    ("div of the weight", (129, 33), lambda w: w / torch.full((129, 33), 7.0)),
    ("cat with float32", (129, 33), lambda w: torch.cat([w, torch.ones(1, 33)])),
    ("linear of both", (129, 33), lambda w: F.linear(w, w)),
    ("embedding_bag", (129, 33), lambda w: F.embedding_bag(IDS, w)),
    ("embedding_bag with padding", (129, 33), lambda w: F.embedding_bag(IDS, w, mode="max", padding_idx=3)),
    ("bilinear", (31, 7, 5), lambda w: F.bilinear(torch.ones(2, 7), torch.ones(2, 5), w, torch.ones(31))),
    ("tensordot", (5, 7, 33), lambda w: torch.tensordot(X, w, dims=([1], [1]))),
    ("tensordot from the left", (5, 7, 33), lambda w: torch.tensordot(w, X, dims=([1], [1]))),
    ("tensordot over one dimension", (7, 5), lambda w: torch.tensordot(X.mT, w, dims=1)),
    ("cdist", (129, 7), lambda w: torch.cdist(X.mT, w)),
    ("interpolate", (1, 7, 33), lambda w: F.interpolate(w, size=9, mode="linear")),
    ("grouped_mm", (3, 32, 24), lambda w: F.grouped_mm(TOKENS, w, offs=OFFSETS)),
    ("grouped_mm of transposed experts", (3, 24, 32), lambda w: F.grouped_mm(TOKENS, w.mT, offs=OFFSETS)),
    ("dtype of the weight", (129, 33), lambda w: X.to(w.dtype)),
    ("to(weight)", (129, 33), lambda w: X.double().to(w)),
    ("type_as", (129, 33), lambda w: X.double().type_as(w)),
    ("zeros_like", (129, 33), torch.zeros_like),
    ("new_ones", (129, 33), lambda w: w.new_ones(3)),
    ("half()", (129, 33), lambda w: w.half()),
    ("double()", (129, 33), lambda w: w.double()),
    ("expand_as", (7, 33), lambda w: torch.ones(33).expand_as(w)),
    ("copy_ out of it", (7, 33), lambda w: torch.zeros(7, 33).copy_(w)),
]

# the result is again stored in float16, on the same storage unless it says otherwise
VIEWS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("t", lambda w: w.t()),
    ("T", lambda w: w.T),
    ("mT", lambda w: w.mT),
    ("transpose", lambda w: w.transpose(0, 1)),
    ("permute", lambda w: w.permute(1, 0)),
    ("view", lambda w: w.view(3, 43, 33)),
    ("reshape", lambda w: w.reshape(-1)),
    ("slice", lambda w: w[3:31, ::2]),
    ("row", lambda w: w[3]),
    ("narrow", lambda w: w.narrow(0, 3, 7)),
    ("chunk", lambda w: w.chunk(3)[1]),
    ("split", lambda w: torch.split(w, 7)[2]),
    ("unbind", lambda w: w.unbind()[5]),
    ("detach", lambda w: w.detach()),
    ("data", lambda w: w.data),
    ("contiguous", lambda w: w.contiguous()),
    ("unsqueeze", lambda w: w[None]),
    ("expand", lambda w: w[None].expand(2, 129, 33)),
    ("float", lambda w: w.float()),
    ("to cpu", lambda w: w.to("cpu")),
    ("to float32", lambda w: w.to(torch.float32)),
]

# what torch copies is an ordinary float32 tensor: it can be written, trained and saved
COPIED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("clone", lambda w: w.clone()),
    ("clone of a slice", lambda w: w[3:31, ::2].clone()),
    ("contiguous that copies", lambda w: w.t().contiguous()),
    ("reshape that copies", lambda w: w.t().reshape(-1)),
    ("flatten that copies", lambda w: w[:, ::2].flatten()),
    ("to, copy=True", lambda w: w.to(torch.float32, copy=True)),
    ("cat", lambda w: torch.cat([w, w])),
    ("stack", lambda w: torch.stack([w, w])),
    ("repeat", lambda w: w.repeat(2, 1)),
    ("tile", lambda w: torch.tile(w, (2,))),
    ("flip", lambda w: w.flip(0)),
    ("roll", lambda w: w.roll(3, 0)),
    ("rows by index", lambda w: w[torch.tensor([1, 5])]),
    ("rows by list", lambda w: w[[1, 5]]),
    ("a mask", lambda w: w[w > 0]),
    ("plus", lambda w: w + 0),
    ("bare deepcopy", lambda w: copy.deepcopy(w.detach())),
    ("copy.deepcopy of a row", lambda w: copy.deepcopy(w[3])),
    ("empty_like, filled", lambda w: torch.empty_like(w).copy_(w)),
    ("zeros_like", torch.zeros_like),
    ("pickled", lambda w: pickle.loads(pickle.dumps(w.detach()))),
    ("saved", lambda w: _saved(w.detach())),
    ("saved slice", lambda w: _saved(w[3:7])),
    ("tril", lambda w: w.tril()),
]

# right by way of a counted float32 copy
FALLS_BACK: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("sum", lambda w: w.sum()),
    ("softmax", lambda w: w.softmax(-1)),
    ("where", lambda w: torch.where(w > 0, w, -w)),
    ("norm", lambda w: w.norm(dim=-1)),
    ("sdpa", lambda w: F.scaled_dot_product_attention(w[None], w[None], w[None])),
]


def make(*shape: int) -> HalfWeight:
    return HalfWeight(torch.randn(shape, generator=torch.Generator().manual_seed(1)).half())


@pytest.mark.parametrize(("shape", "operation"), [pytest.param(s, f, id=n) for n, s, f in HANDLED])
def test_handled_without_a_float32_copy(shape: tuple[int, ...], operation: Callable[[Tensor], Tensor]) -> None:
    weight = make(*shape)
    got, want = operation(weight), operation(weight.upcast())
    assert type(got) is Tensor
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert relative_error(got, want) < 1e-6
    assert weight.fallbacks.calls == {}


@pytest.mark.parametrize("operation", [pytest.param(f, id=n) for n, f in VIEWS])
def test_views_stay_in_float16(operation: Callable[[Tensor], Tensor]) -> None:
    weight = make(129, 33)
    got = operation(weight)
    assert isinstance(got, HalfWeight)
    assert got.dtype == torch.float32
    assert torch.equal(got.upcast(), operation(weight.upcast()))
    assert got.stored.untyped_storage().data_ptr() == weight.stored.untyped_storage().data_ptr()
    assert weight.fallbacks.calls == {}


def _saved(tensor: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    loaded: Tensor = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("operation", [pytest.param(f, id=n) for n, f in COPIED])
def test_copies_are_ordinary_float32_tensors(operation: Callable[[Tensor], Tensor]) -> None:
    weight = make(129, 33)
    got, want = operation(weight), operation(weight.upcast())
    assert type(got) is Tensor
    assert got.dtype == torch.float32
    assert got.stride() == want.stride()
    assert torch.equal(got, want)
    before = weight.upcast()
    got += 1e-6  # no rounding, and nothing arrives in the weight
    assert torch.equal(got, want + 1e-6)
    assert torch.equal(weight.upcast(), before)


@pytest.mark.parametrize("operation", [pytest.param(f, id=n) for n, f in FALLS_BACK])
def test_anything_else_is_right_and_counted(operation: Callable[[Tensor], Tensor]) -> None:
    weight = make(129, 33)
    got, want = operation(weight), operation(weight.upcast())
    assert type(got) is Tensor
    assert torch.equal(got, want)
    assert sum(weight.fallbacks.calls.values()) >= 1
    assert max(weight.fallbacks.largest.values()) == 129 * 33 * 4


def test_large_weights_are_widened_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcast.kernels.portable.TILE", 100)
    monkeypatch.setattr("upcast.tensor.matmul_ops.TILE", 100)
    for name, shape, operation in HANDLED:
        weight = make(*shape)
        assert relative_error(operation(weight), operation(weight.upcast())) < 1e-6, name


def test_it_looks_like_a_float32_parameter_and_weighs_half() -> None:
    weight = parameter(torch.randn(7, 33).half(), Fallbacks())
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == torch.float32
    assert weight.is_floating_point()
    assert weight.type() == "torch.FloatTensor"
    assert (weight.shape, weight.stride(), weight.device) == ((7, 33), (33, 1), torch.device("cpu"))
    assert (weight.element_size(), weight.nbytes) == (2, 7 * 33 * 2)
    assert not weight.requires_grad
    assert "stored in float16" in repr(weight)


INPLACE: list[tuple[str, Callable[[Tensor], object]]] = [
    ("mul_", lambda w: w.mul_(2)),
    ("+=", lambda w: w.__iadd__(1)),
    ("setitem", lambda w: w.__setitem__(slice(0, 2), 0.0)),
    ("init.ones_", nn.init.ones_),
    ("copy_", lambda w: w.copy_(torch.full((7, 33), 0.1))),
    ("fill_", lambda w: w.fill_(3)),
    ("zero_", lambda w: w.zero_()),
]


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("operation", [pytest.param(f, id=n) for n, f in INPLACE])
def test_in_place_operations_write_through(operation: Callable[[Tensor], object], inference: bool) -> None:
    weight = make(7, 33)
    want, storage = weight.upcast(), weight.stored.data_ptr()
    with torch.inference_mode() if inference else torch.no_grad():
        operation(want)
        operation(weight)
    assert torch.equal(weight.stored, want.half())
    assert weight.stored.data_ptr() == storage


@pytest.mark.parametrize("value", [65505.0, 1e30, float("inf"), float("nan"), 70000])
def test_a_write_beyond_float16_makes_it_float32(value: float) -> None:
    for write in (
        lambda w: w.copy_(torch.full((7, 33), value)),
        lambda w: w.data.fill_(value),
        lambda w: w[3].mul_(value),
        lambda w: w.t().__setitem__((0, 1), value),
        lambda w: w.view(-1)[3:5].copy_(torch.tensor([value, 1.0])),
    ):
        weight, want = make(7, 33), make(7, 33).upcast()
        write(weight)
        write(want)
        assert torch.equal(weight.nan_to_num(), want.nan_to_num())
        assert type(weight) is Tensor


def test_special_values_propagate_as_in_float32() -> None:
    stored = torch.tensor([[65504.0, 6e-8, -0.0], [float("inf"), float("nan"), 1.0]]).half()
    weight = HalfWeight(stored)
    x = torch.tensor([[2.0, 1.0, 1.0]])
    assert torch.equal(F.linear(x, weight)[0, :1], F.linear(x, stored.float())[0, :1])
    assert F.linear(x, weight)[0, 1].isnan()
    assert torch.equal(F.embedding(torch.tensor([0]), weight)[0], stored[0].float())


def test_gradients_flow_through_and_only_float16_is_saved() -> None:
    weight = make(31, 33)
    x, reference = (X.clone().requires_grad_() for _ in range(2))
    bias = torch.zeros(31, requires_grad=True)
    y = F.linear(x, weight, bias)
    saved = y.grad_fn.next_functions[0][0].saved_tensors  # type: ignore[union-attr]
    assert [t.dtype for t in saved] == [torch.float16]
    y.square().sum().backward()
    F.linear(reference, weight.upcast()).square().sum().backward()
    assert relative_error(x.grad, reference.grad) < 1e-6
    assert bias.grad is not None
    assert weight.fallbacks.calls == {}


def test_second_derivatives() -> None:
    weight = make(31, 33)

    def penalty(w: Tensor) -> Tensor:
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.linear(x, w).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    assert relative_error(penalty(weight), penalty(weight.upcast())) < 1e-5


def test_only_float16_can_be_stored() -> None:
    with pytest.raises(upcast.UpcastError, match=r"torch\.float32; it stores float16"):
        HalfWeight(torch.zeros(2, 2))


def test_a_parameter_s_copy_is_float32_and_in_a_list_stored_alike() -> None:
    weight = parameter(make(7, 33).stored, Fallbacks(), wants_grad=True)
    weight.mark = threading.Lock()  # torch's deep copies of parameters leave such things out
    bare = copy.deepcopy(weight)
    assert type(bare) is nn.Parameter
    assert bare.requires_grad
    (other,) = copy.deepcopy([weight])
    assert not hasattr(bare, "mark") and not hasattr(other, "mark")  # noqa: PT018
    assert isinstance(other, HalfWeight)
    assert isinstance(other, nn.Parameter)
    assert torch.equal(other.stored, weight.stored)
    with torch.no_grad():
        other.zero_()
        bare.zero_()
    assert weight.stored.abs().sum() > 0


@pytest.mark.parametrize("wants", [False, True])
def test_a_bare_parameter_pickles_as_a_float32_parameter(wants: bool) -> None:
    weight = parameter(make(7, 33).stored, Fallbacks(), wants)
    weight.mark = 7
    for loaded in (_saved(weight), pickle.loads(pickle.dumps(weight))):
        assert type(loaded) is nn.Parameter
        assert loaded.requires_grad is wants
        assert torch.equal(loaded, weight.upcast())
    assert pickle.loads(pickle.dumps(weight)).mark == 7


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_equals_float32_linear_for_any_shape(m: int, n: int, k: int, transposed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn((k, n) if transposed else (n, k), generator=generator).half()
    x = torch.randn(m, k, generator=generator)
    weight = HalfWeight(stored.t() if transposed else stored)
    want = F.linear(x.double(), weight.upcast().double())
    torch_error = (F.linear(x, weight.upcast()).double() - want).abs().sum()
    assert (F.linear(x, weight).double() - want).abs().sum() <= 2 * torch_error + 1e-5


def test_bfloat16_s_65536_is_out_of_range_as_float32_s_is() -> None:
    weight = HalfWeight(torch.zeros(2, 2, dtype=torch.float16))
    weight.overwrite(torch.full((2, 2), 65536.0, dtype=torch.bfloat16))
    assert weight.store.half is None
    assert torch.equal(weight, torch.full((2, 2), 65536.0))

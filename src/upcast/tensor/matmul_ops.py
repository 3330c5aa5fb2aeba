"""Products of activations with a HalfWeight: linear, matmul, convolutions, einsum, experts.

Everything that is a matrix product goes to the kernels. Convolutions and einsum run in torch on tiles of the weight
along a dimension of the output, so that no whole large weight is ever upcast.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.core.errors import UpcastError
from upcast.core.functional import F
from upcast.kernels import transforms
from upcast.kernels.portable import TILE
from upcast.tensor import autocast
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.upcasting import call_upcast
from upcast.tensor.view_ops import handles, handles_each, named

_TAKEN = (torch.float32, torch.float16, torch.bfloat16)  # from these, products are float32
_REFUSALS = (UpcastError, TypeError, RuntimeError, IndexError)  # of kernels, for what they do not take


def _note_gradient(weight: HalfWeight, result: Tensor) -> None:
    """Have the weight know when a backward pass goes by that would have left it a gradient."""
    if weight.wants_grad and result.requires_grad and not torch.compiler.is_compiling():
        account = weight.fallbacks

        def passed_by(gradients: Any) -> None:
            account.missed_gradient = True

        assert result.grad_fn is not None
        result.grad_fn.register_prehook(passed_by)


def _times(x: Tensor, operand: Any, bias: Tensor | None = None) -> Tensor:
    """Return x @ operand.T + bias for the operand of a matrix."""
    if x.dtype in (torch.float16, torch.bfloat16):  # an input the caller halved; the model computes in float32
        x = x.float()
    return autocast.rounded(kernels.linear(x, operand, bias))


@handles(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if (
        type(weight) is HalfWeight
        and weight.row_major
        and type(input) is Tensor
        and input.dtype is torch.float32
        and (implementation := kernels.direct()) is not None
        and not input.is_neg()
        and (bias is None or not bias.is_neg())
        and not autocast.enabled()
    ):  # the hot path
        try:
            return implementation.linear(input, weight.store.half, bias)
        except _REFUSALS:
            pass  # sparse, nested, of another size: of these torch makes its own result, or its own error
    if isinstance(input, HalfWeight) and isinstance(weight, HalfWeight) and input.numel() <= weight.numel():
        input = input.upcast()  # a learned query, say: no larger than a layer's weight
    if not _takes_part(input, weight, bias):
        return call_upcast(F.linear, (input, weight, bias), {})
    assert isinstance(weight, HalfWeight)
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    result = _times(input, weight.operand, bias)
    _note_gradient(weight, result)
    return result


def _takes_part(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether only the weight is stored in float16, and the product is one that the kernels know."""
    if not isinstance(weight, HalfWeight) or weight.dim() != 2 or not _takes(x, weight.shape[1]):
        return False
    return bias is None or (dense(bias) and bias.dtype in _TAKEN and bias.shape == weight.shape[:1])


def _takes(x: Tensor, size: int) -> bool:
    """Whether the kernels take x (..., size). Of anything else torch makes its own result, or its own error."""
    return factor(x) and x.dim() > 0 and x.shape[-1] == size


def factor(x: Tensor) -> bool:
    """Whether x, of whatever shape, is something that the kernels multiply with a weight."""
    return dense(x) and x.dtype in _TAKEN


def dense(x: Tensor) -> bool:
    """Whether x is no weight of ours, and its numbers are in plain memory: not sparse, nested or yet to be negated."""
    plain = not isinstance(x, HalfWeight) and x.layout is torch.strided and not x.is_nested
    return plain and x.is_cpu and not x.is_neg()


def _shortest(x: Any, weight: Any, bias: Tensor | None, any_shape: bool) -> Any:
    """Return x @ weight + bias in plain inference, for a matrix x (or ``any_shape``); None for anything else."""
    plain = isinstance(weight, HalfWeight) and type(x) is Tensor and x.dtype is torch.float32 and not x.is_neg()
    if not plain or kernels.direct() is None or autocast.enabled():
        return None
    if weight.outline.dim() != 2 or not (any_shape or x.dim() == 2):
        return None
    try:
        return kernels.unfollowed_linear(x, weight.operand.t(), bias)
    except _REFUSALS:
        return None


@handles_each(*named("matmul mm bmm mv __matmul__"))
def _matmul(function: Any, *given: Tensor, out: Tensor | None = None, **by_name: Tensor) -> Any:
    a, b = (*given, *by_name.values())
    found = _shortest(a, b, None, function in _BROADCASTING) if out is None and function not in _BATCHES else None
    if found is not None:
        return found
    if out is not None or (function in _VECTORS and autocast.active()):  # which leaves mv in float32
        return call_upcast(function, (a, b), {} if out is None else {"out": out})
    if isinstance(a, HalfWeight) and isinstance(b, HalfWeight):
        a, b = (a.upcast(), b) if a.numel() < b.numel() else (a, b.upcast())
    return _product(function, a, b)


_VECTORS = frozenset(named("mv addmv"))
_BATCHES = frozenset(named("bmm"))
_BROADCASTING = frozenset(named("matmul __matmul__"))


@handles(Tensor.__rmatmul__)
def _rmatmul(b: Tensor, a: Tensor) -> Any:
    return _product(torch.matmul, a, b)


def _product(function: Any, a: Tensor, b: Tensor) -> Any:
    """Return a @ b, one of which is a HalfWeight; ``function`` is what the caller asked of torch."""
    weight = a if isinstance(a, HalfWeight) else b
    assert isinstance(weight, HalfWeight)
    other = b if weight is a else a
    if not factor(other) or not _fit(function, a, b) or weight.outline.dim() == 1:
        return call_upcast(function, (a, b), {})
    if weight.dim() > 2 and (
        weight.numel() <= TILE or transforms.jit_traces()
    ):  # no more than a tile: a cache's rows in use, say
        return torch.matmul(*(weight.upcast() if each is weight else each for each in (a, b)))
    if weight.dim() > 2:
        return _batched(a, b)
    if weight is b:
        return _times(a, weight.operand.t())
    if other.dim() == 1:
        return _times(other, weight.operand)
    return _times(other.transpose(-2, -1), weight.operand).transpose(-2, -1)  # ONNX from TorchScript knows no mT


_DIMENSIONS = {
    **dict.fromkeys(named("mm"), (2, 2)),
    **dict.fromkeys(named("bmm"), (3, 3)),
    **dict.fromkeys(named("mv"), (2, 1)),
}


def _fit(function: Any, a: Tensor, b: Tensor) -> bool:
    """Whether a @ b is a product of the kind ``function``; torch says what is wrong with any other."""
    if not a.dim() or not b.dim() or a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        return False
    wanted = _DIMENSIONS.get(function, (a.dim(), b.dim()))
    return wanted == (a.dim(), b.dim()) and (wanted != (3, 3) or a.shape[0] == b.shape[0] or function in _BROADCASTING)


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for a weight of more than two dimensions (experts): one matrix at a time."""
    a2, b2 = (a.unsqueeze(0) if a.dim() == 1 else a), (b.unsqueeze(1) if b.dim() == 1 else b)
    batch = torch.broadcast_shapes(a2.shape[:-2], b2.shape[:-2])
    a2, b2 = (each.expand(*batch, *each.shape[-2:]) for each in (a2, b2))
    out = torch.stack([_product(torch.mm, a2[i], b2[i]) for i in itertools.product(*map(range, batch))])
    out = out.view(*batch, *out.shape[-2:])
    out = out.squeeze(-2) if a.dim() == 1 else out
    return out.squeeze(-1) if b.dim() == 1 else out


@handles_each(*named("addmm baddbmm addmv"))
def _add_product(
    function: Any,
    addend: Tensor,
    *factors: Tensor,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
    **by_name: Tensor,
) -> Any:
    """Return beta * addend + alpha * (a @ b); torch calls a and b mat1 and mat2, batch1 and batch2, or mat and vec."""
    a, b = (*factors, *by_name.values())
    if beta == alpha == 1 and out is None and function in _ADDMM:
        found = _shortest(a, b, addend, any_shape=False)
        if found is not None:
            return found
    ours = dense(addend) and (factor(b) if isinstance(a, HalfWeight) else isinstance(b, HalfWeight) and factor(a))
    if out is not None or not ours or not _adds(function, addend, a, b) or (function in _VECTORS and autocast.active()):
        settings = {"beta": beta, "alpha": alpha, **({} if out is None else {"out": out})}
        return call_upcast(function, (addend, a, b), settings)
    if isinstance(b, HalfWeight) and b.dim() == 2 and beta == alpha == 1 and addend.shape == b.shape[1:]:
        return _times(a, b.operand.t(), addend.float())
    product = _product(_FACTORS[function], a, b)
    result = (product if alpha == 1 else alpha * product) + (addend if beta == 1 else beta * addend)
    return autocast.rounded(result)


_ADDMM = frozenset(named("addmm"))
_FACTORS = {
    getattr(home, name): getattr(home, product)
    for home in (torch, Tensor)
    for name, product in (("addmm", "mm"), ("baddbmm", "bmm"), ("addmv", "mv"))
}


def _adds(function: Any, addend: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether these are what ``function`` adds up, in float32; or what autocast makes of it."""
    if not _fit(_FACTORS[function], a, b):
        return False
    shape = (*a.shape[:-1], *b.shape[-1:]) if b.dim() > 1 else a.shape[:-1]
    wide = autocast.active() or addend.dtype == torch.float32
    return wide and addend.dtype in _TAKEN and torch.broadcast_shapes(addend.shape, shape) == shape


@handles(*(f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f))
def _grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Rows offs[e-1]..offs[e] of x (T, K) times weight[e] of (E, K, N), for the experts that have rows."""
    shape = weight.outline.shape if isinstance(weight, HalfWeight) else ()
    known = len(shape) == 3 and x.dim() == 2 and _takes(x, shape[1])
    if not known or offs is None or transforms.jit_traces():
        args = (x, weight, offs, bias, out_dtype)
        return call_upcast(F.grouped_mm, args, {})
    x = x.float()
    ends = offs.to(torch.int64)
    used = int(ends[-1])
    assert isinstance(weight, HalfWeight)
    out = kernels.grouped_linear(x[:used], weight.operand, torch.diff(ends, prepend=ends.new_zeros(1)))
    if used < x.shape[0]:  # rows of no expert
        out = torch.cat([out, x.new_zeros(x.shape[0] - used, out.shape[1])])
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


# --- tiles along a dimension of the output --------------------------------------------------------------------------


def _in_tiles(weight: HalfWeight, dim: int, out_dim: int, product: Callable[[Tensor, slice], Any]) -> Tensor:
    """Join ``product(tile, where)`` over float32 tiles of ``weight`` cut along ``dim``, along ``out_dim``."""
    stored = weight.stored
    size = stored.shape[dim]
    step = max(1, TILE * size // max(stored.numel(), 1))
    cuts = [slice(start, min(start + step, size)) for start in range(0, size, step)] or [slice(0, 0)]
    parts = [product(stored.narrow(dim, cut.start, cut.stop - cut.start).float(), cut) for cut in cuts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, out_dim)


@handles_each(torch.conv1d, torch.conv2d, torch.conv3d)
def _conv(
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(weight, HalfWeight) or not factor(input):
        args = (input, weight, bias, stride, padding, dilation, groups)
        return call_upcast(function, args, {})
    x = input.float()

    def product(tile: Tensor, cut: slice) -> Any:
        part = None if bias is None else bias[cut]
        return function(x, tile, part, stride, padding, dilation, groups)

    if groups == 1:
        return _in_tiles(weight, 0, -(weight.outline.dim() - 1), product)

    def some_groups(x: Tensor, tile: Tensor, bias: Tensor | None, count: int) -> Any:
        return function(x, tile, bias, stride, padding, dilation, count)

    return _by_groups(x, weight, bias, groups, weight.outline.shape[0] // groups, some_groups)


@handles_each(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _conv_transpose(
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    if not isinstance(weight, HalfWeight) or not factor(input):
        args = (input, weight, bias, stride, padding, output_padding, groups, dilation)
        return call_upcast(function, args, {})
    x = input.float()

    def some_groups(x: Tensor, tile: Tensor, bias: Tensor | None, count: int) -> Any:
        return function(x, tile, bias, stride, padding, output_padding, count, dilation)

    if groups > 1:
        return _by_groups(x, weight, bias, groups, weight.outline.shape[1], some_groups)

    def product(tile: Tensor, cut: slice) -> Any:
        return some_groups(x, tile, None if bias is None else bias[cut], 1)

    return _in_tiles(weight, 1, -(weight.outline.dim() - 1), product)


def _by_groups(
    x: Tensor,
    weight: HalfWeight,
    bias: Tensor | None,
    groups: int,
    outputs: int,
    product: Callable[[Tensor, Tensor, Tensor | None, int], Any],
) -> Tensor:
    """Join ``product(x, tile, bias, groups)`` over some groups at a time; each group has ``outputs`` channels."""
    channels = -(weight.outline.dim() - 1)
    rows, inputs = weight.outline.shape[0] // groups, x.shape[channels] // groups
    stored = weight.stored
    step = max(1, TILE * groups // max(stored.numel(), 1))
    parts = []
    for start in range(0, groups, step):
        count = min(step, groups - start)
        tile = stored.narrow(0, start * rows, count * rows).float()
        part = None if bias is None else bias.narrow(0, start * outputs, count * outputs)
        parts.append(product(x.narrow(channels, start * inputs, count * inputs), tile, part, count))
    return parts[0] if len(parts) == 1 else torch.cat(parts, channels)


@handles(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Any:
    weights = [i for i, operand in enumerate(operands) if isinstance(operand, HalfWeight)]
    where = weights[0] if len(weights) == 1 and isinstance(equation, str) else None
    cut = None if where is None else _cut_dimension(equation, where, operands[where].outline.shape)
    if where is None or cut is None:
        return call_upcast(torch.einsum, (equation, *operands), {})
    dim, out_dim = cut

    def product(tile: Tensor, _: slice) -> Any:
        return torch.einsum(equation, *operands[:where], tile, *operands[where + 1 :])

    return _in_tiles(operands[where], dim, out_dim, product)


def _cut_dimension(equation: str, where: int, shape: torch.Size) -> tuple[int, int] | None:
    """Return (dimension of operand ``where``, dimension of the output) for its longest index of its own, if any."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or not math.prod(shape):
        return None
    others = "".join(terms[:where] + terms[where + 1 :])
    own = [i for i, index in enumerate(terms[where]) if index in output and index not in others]
    if not own:
        return None
    dim = max(own, key=lambda i: shape[i])
    return dim, output.index(terms[where][dim])

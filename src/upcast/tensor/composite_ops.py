"""Operations that torch builds out of others, and elementwise ones, on a HalfWeight: whole or in tiles.

Attention layers run torch's own code over the handlers of the products inside it. Selections such as bags of
embeddings upcast the rows they use. Elementwise operations and what works per channel take a large weight in tiles.
"""

import math
import types
from typing import Any

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core.functional import F
from upcast.kernels import transforms
from upcast.tensor.genuine import Root, originals
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.matmul_ops import _in_tiles, _times, factor
from upcast.tensor.upcasting import call_upcast
from upcast.tensor.view_ops import handles, handles_each, named

# --- torch's own composites -----------------------------------------------------------------------------------------


def _past_the_door(function: Any) -> Any:
    """Return ``function`` of torch.nn.functional without its first question whether an argument overrides it."""
    no_override = {"has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, {**function.__globals__, **no_override}, function.__name__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copy


_attention = _past_the_door(F.multi_head_attention_forward)


@handles(F.multi_head_attention_forward)
def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or originals(_attention_roots).intact():
        return _attention(*args, **kwargs)
    return _past_the_door(F.multi_head_attention_forward)(*args, **kwargs)  # with what it finds by name now


def _attention_roots() -> list[Root]:
    return [(nn.functional, F.multi_head_attention_forward.__name__)]


@handles(F.embedding_bag)
def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    rest = (norm_type, False, mode, False, per_sample_weights, include_last_offset)
    whole = input.dtype in (torch.int64, torch.int32) and input.layout is torch.strided and not input.is_nested
    # max_norm renormalises the weight in place; transformations know no unique()
    if max_norm is not None or not isinstance(weight, HalfWeight) or not whole or transforms.active():
        return call_upcast(F.embedding_bag, (input, weight, offsets, max_norm, *rest, padding_idx), {})
    used, places = torch.unique(input, return_inverse=True)
    padding = None
    if padding_idx is not None:
        found = (used == padding_idx % weight.outline.shape[0]).nonzero()
        padding = int(found[0]) if len(found) else None
    rows = kernels.embedding(used, weight.operand)
    return F.embedding_bag(places.view(input.shape), rows, offsets, None, *rest, padding)


@handles(torch.bilinear)
def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, HalfWeight) or isinstance(input1, HalfWeight) or isinstance(input2, HalfWeight):
        return call_upcast(torch.bilinear, (input1, input2, weight, bias), {})

    def product(tile: Tensor, cut: slice) -> Any:
        return F.bilinear(input1, input2, tile, None if bias is None else bias[cut])

    return _in_tiles(weight, 0, -1, product)


@handles(torch.tensordot)
def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, out: Tensor | None = None) -> Any:
    ours = factor(b) if isinstance(a, HalfWeight) else isinstance(b, HalfWeight) and factor(a)
    count = dims if isinstance(dims, int) else None
    in_a, in_b = (list(range(-count, 0)), list(range(count))) if count is not None else map(_listed, dims)
    if out is not None or not ours or not _contracts(a, in_a, b, in_b):
        return call_upcast(torch.tensordot, (a, b), {"dims": dims, "out": out})
    left, right = _as_matrix(a, in_a, last=True), _as_matrix(b, in_b, last=False)
    kept = [a.shape[i] for i in _others(a, in_a)] + [b.shape[i] for i in _others(b, in_b)]
    if isinstance(b, HalfWeight):
        return _times(left, right.t()).reshape(kept)
    return _times(right.t(), left).t().reshape(kept)


def _contracts(a: Tensor, in_a: list[int], b: Tensor, in_b: list[int]) -> bool:
    """Whether the dimensions ``in_a`` are there and as long as ``in_b``; torch says what is wrong with others."""
    there = all(-x.dim() <= dim < x.dim() for x, dims in ((a, in_a), (b, in_b)) for dim in dims)
    return there and [a.shape[dim] for dim in in_a] == [b.shape[dim] for dim in in_b]


def _listed(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else [int(dim) for dim in dims]


def _others(tensor: Tensor, dims: list[int]) -> list[int]:
    taken = {dim % tensor.dim() for dim in dims}
    return [dim for dim in range(tensor.dim()) if dim not in taken]


def _as_matrix(tensor: Tensor, dims: list[int], last: bool) -> Tensor:
    """Return ``tensor`` as a matrix whose columns (rows, if not ``last``) are its ``dims``; a weight stays float16."""
    plain = tensor.stored if isinstance(tensor, HalfWeight) else tensor
    others, summed = _others(plain, dims), [dim % plain.dim() for dim in dims]
    size = math.prod(plain.shape[dim] for dim in summed)
    ordered = plain.permute(others + summed if last else summed + others)
    return ordered.reshape(-1, size) if last else ordered.reshape(size, -1)


@handles(torch.cdist)
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    mode = compute_mode or "use_mm_for_euclid_dist_if_necessary"
    if not isinstance(x2, HalfWeight) or isinstance(x1, HalfWeight) or x1.dtype == torch.float64:
        return call_upcast(torch.cdist, (x1, x2, p, mode), {})
    dim = x2.outline.dim() - 2
    return _in_tiles(x2, dim, -1, lambda tile, _: torch.cdist(x1, tile, p, mode))


@handles(F.interpolate)
def _interpolate(input: Tensor, *args: Any, **kwargs: Any) -> Any:
    assert isinstance(input, HalfWeight)
    return _in_tiles(input, 1, 1, lambda tile, _: F.interpolate(tile, *args, **kwargs))


@handles(F.dropout)
def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training:
        return input
    return call_upcast(F.dropout, (input, p, training, inplace), {})


# --- elementwise ----------------------------------------------------------------------------------------------------


@handles_each(
    *named("add sub mul div true_divide multiply divide subtract __rsub__ __rmul__ __radd__ __rdiv__ __rtruediv__"),
)
def _elementwise(function: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    weight = b if isinstance(b, HalfWeight) else a
    other = a if weight is b else b
    special = isinstance(other, Tensor) and (other.layout is not torch.strided or other.is_nested)
    if special or isinstance(other, HalfWeight) or not weight.outline.dim() or kwargs.get("out") is not None:
        return call_upcast(function, (a, b, *args), kwargs)
    dim = max(range(weight.outline.dim()), key=lambda i: weight.outline.shape[i])
    from_end, size = dim - weight.outline.dim(), weight.outline.shape[dim]

    def part(tile: Tensor, cut: slice) -> Any:
        there = other
        if isinstance(other, Tensor) and other.dim() >= -from_end and other.shape[from_end] == size != 1:
            there = other.narrow(from_end, cut.start, cut.stop - cut.start)
        return function(tile, there, *args, **kwargs) if weight is a else function(there, tile, *args, **kwargs)

    return _in_tiles(weight, dim, from_end, part)

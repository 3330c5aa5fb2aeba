"""What each torch function does with a HalfWeight, except products (`upcast.tensor.matmul_ops`).

Functions that only look at a weight differently (views) give another HalfWeight on the same storage. Selections
upcast only what they select. Functions that ask for shape, dtype or device never touch the numbers. Anything not
listed falls through to a counted float32 copy (`upcast.tensor.upcasting.call_upcast`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.core.functional import F
from upcast.kernels import transforms
from upcast.tensor import autocast
from upcast.tensor.half_weight import HANDLERS, HalfWeight
from upcast.tensor.upcasting import call_in_memory, call_upcast

Handler = Callable[..., Any]


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register the decorated handler for ``functions``."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def handles_each(*functions: Any) -> Callable[[Handler], Handler]:
    """Register the decorated handler for each of ``functions``, which it gets as its first argument."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update({function: functools.partial(handler, function) for function in functions})
        return handler

    return register


def named(names: str) -> list[Any]:
    """Return the functions of these names in ``torch`` and in ``torch.Tensor``, where they exist."""
    return [getattr(home, name) for home in (torch, Tensor) for name in names.split() if hasattr(home, name)]


def accessor(name: str) -> Any:
    """Return the descriptor behind an attribute of ``torch.Tensor``."""
    return getattr(Tensor, name)


def without_numbers(value: Any) -> Any:
    """Stand in for a HalfWeight of which only shape, dtype or device is asked: float32, one number long."""
    if isinstance(value, HalfWeight):
        return torch.empty((), dtype=torch.float32, device=value.device).expand(value.shape)
    return value


# --- views and copies -------------------------------------------------------------------------------------------------


@handles_each(
    *named("t transpose permute view reshape narrow select unsqueeze squeeze flatten unflatten expand expand_as"),
    *named("view_as movedim moveaxis swapaxes swapdims chunk split tensor_split unbind contiguous"),
    *named("alias diagonal adjoint resolve_conj resolve_neg reshape_as ravel unfold hsplit vsplit dsplit"),
    *named("unsafe_chunk unsafe_split unsafe_split_with_sizes split_with_sizes broadcast_to positive"),
    *(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d, torch.conj, torch.Tensor.conj, torch.real),
    *(accessor(name).__get__ for name in ("T", "mT", "H", "mH", "data", "real")),
)
def _view(function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """What looks at the same memory is a view of the weight; what torch had to copy is an ordinary float32 tensor."""
    if not isinstance(weight, HalfWeight):  # x.expand_as(weight)
        return function(weight, *map(without_numbers, args), **kwargs)
    if torch.dtype in map(type, (*args, *kwargs.values())):  # view(dtype) looks at the bytes of the float32 numbers
        return call_in_memory(function, (weight, *args), kwargs)
    outline, args = weight.outline, tuple(map(without_numbers, args))
    result = function(outline, *args, **kwargs)
    if result is outline:
        return weight
    shares = not isinstance(result, Tensor) or torch.compiler.is_compiling() or _same_memory(result, outline)
    if shares:
        return weight.like(result)
    return (function(weight.stored, *args, **kwargs) if outline.is_meta else result).float()


@handles(*named("detach"))
def _detach(weight: HalfWeight) -> HalfWeight:
    alias: HalfWeight = weight.like(weight.outline.detach())
    alias.source = weight
    return alias


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


@handles_each(*named("clone"))
def _clone(function: Any, weight: HalfWeight, *, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    return weight.stored.to(torch.float32, memory_format=memory_format)


@handles_each(*named("repeat repeat_interleave tile roll flip fliplr flipud rot90"))
def _copied(function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Return an ordinary tensor in another order: it is float16 no longer than it takes."""
    if not isinstance(weight, HalfWeight) or any(isinstance(each, HalfWeight) for each in args):
        return call_upcast(function, (weight, *args), kwargs)
    return function(weight.stored, *args, **kwargs).float()


@handles(Tensor.__getitem__)
def _getitem(tensor: Tensor, index: Any) -> Any:
    if not isinstance(tensor, HalfWeight):
        return call_upcast(Tensor.__getitem__, (tensor, index), {})
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, HalfWeight) for part in parts):
        return call_upcast(Tensor.__getitem__, (tensor, index), {})
    if all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts):
        return tensor.like(tensor.outline[index])
    stored = tensor.stored
    result = stored[index]
    return tensor.like(result) if _shares(result, stored) else result.float()


def _shares(result: Tensor, stored: Tensor) -> bool:
    """Whether an index that is no plain one, such as a number of NumPy's, has selected a view all the same."""
    return not transforms.active() and result.numel() > 0 and _same_memory(result, stored)


@handles_each(*named("cat concat concatenate stack hstack vstack"))
def _join(function: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("out") is not None or autocast.active():  # which joins no float16 with others
        return call_upcast(function, (tensors, *args), kwargs)
    stored = [tensor.stored if isinstance(tensor, HalfWeight) else tensor for tensor in tensors]
    if all(isinstance(tensor, HalfWeight) for tensor in tensors):
        return function(stored, *args, **kwargs).float()
    if any(tensor.dtype == torch.float32 for tensor in stored):  # torch upcasts what it joins to float32
        return function(stored, *args, **kwargs)
    return call_upcast(function, (tensors, *args), kwargs)


_INDICES = (torch.int64, torch.int32)


# --- selections: only the chosen rows are upcast -------------------------------------------------------------------


@handles_each(*named("index_select gather take take_along_dim"))
def _select(function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, HalfWeight):
        return call_upcast(function, (tensor, *args), kwargs)
    return function(tensor.stored, *args, **kwargs).float()


@handles(F.embedding)
def _embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    plain = indices.dtype in _INDICES and indices.layout is torch.strided
    if max_norm is not None or not plain or indices.is_nested:  # max_norm renormalises the weight in place
        args = (indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return call_upcast(F.embedding, args, {})
    assert isinstance(weight, HalfWeight)
    if weight.dim() != 2:
        return call_upcast(torch.nn.functional.embedding, (indices, weight, padding_idx), {})
    return kernels.embedding(indices, weight.operand)


# --- conversions and questions --------------------------------------------------------------------------------------


@handles(Tensor.to)
def _to(tensor: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    args = tuple(map(without_numbers, args))
    if not isinstance(tensor, HalfWeight):
        return tensor.to(*args, copy=copy, **{key: without_numbers(value) for key, value in kwargs.items()})
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device not in (None, tensor.device):
        return tensor.stored.to(device).to(dtype or torch.float32)
    if dtype in (None, torch.float32):
        return tensor.stored.float() if copy else tensor
    return tensor.stored.to(dtype, copy=True)  # a copy even of float16: the caller may write into it


@handles(Tensor.float, Tensor.cpu)
def _same(weight: HalfWeight, **kwargs: Any) -> HalfWeight:
    return weight


@handles_each(Tensor.half, Tensor.double, Tensor.bfloat16, Tensor.int, Tensor.long, Tensor.bool)
def _convert(function: Any, weight: HalfWeight, **kwargs: Any) -> Tensor:
    result: Tensor = function(weight.stored, **kwargs)
    return result.clone() if result is weight.stored else result


@handles(Tensor.type_as)
def _type_as(tensor: Tensor, other: Tensor) -> Any:
    return _to(tensor, other.dtype)


@handles(Tensor.type)
def _type(weight: HalfWeight, dtype: Any = None, non_blocking: bool = False) -> Any:
    return "torch.FloatTensor" if dtype is None else weight.stored.float().type(dtype)


@handles_each(
    *named("empty_like zeros_like ones_like full_like rand_like randn_like"),
    *named("new_empty new_zeros new_ones new_full new_tensor result_type can_cast"),
)
def _like(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*map(without_numbers, args), **kwargs)

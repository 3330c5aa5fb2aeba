"""What each torch function does with a HalfWeight, except products (`upcast.products`).

Functions that only look at a weight differently (views) give another HalfWeight on the same storage. Selections
widen only what they select. Functions that ask for shape, dtype or device never touch the numbers. Anything not
listed falls through to a counted float32 copy (`upcast.half_weight.call_widened`).
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.errors import UpcastError
from upcast.half_weight import HANDLERS, HalfWeight, call_widened

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
        return torch.empty((), device=value.stored.device).expand(value.stored.shape)
    return value


# --- views ----------------------------------------------------------------------------------------------------------


@handles_each(
    *named("t transpose permute view reshape narrow select unsqueeze squeeze flatten unflatten expand expand_as"),
    *named("view_as movedim moveaxis swapaxes swapdims chunk split tensor_split unbind contiguous clone"),
    *named("alias diagonal adjoint resolve_conj resolve_neg reshape_as repeat repeat_interleave tile roll flip"),
    *(accessor(name).__get__ for name in ("T", "mT", "H", "mH", "data")),
)
def _view(function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(weight, HalfWeight):  # x.expand_as(weight)
        return function(weight, *map(without_numbers, args), **kwargs)
    if torch.dtype in map(type, args):  # view(dtype) looks at the bytes of the float32 numbers
        return call_widened(function, (weight, *args), kwargs)
    result = function(weight.stored, *map(without_numbers, args), **kwargs)
    return weight.like(result) if isinstance(result, Tensor) else tuple(map(weight.like, result))


@handles(*named("detach"))
def _detach(weight: HalfWeight) -> HalfWeight:
    alias = weight.like(weight.stored.detach())
    alias.twin = weight.twin  # the alias may take the place of the weight: Module._apply swaps them
    return alias


@handles(Tensor.__getitem__)
def _getitem(tensor: Tensor, index: Any) -> Any:
    if not isinstance(tensor, HalfWeight):
        return call_widened(Tensor.__getitem__, (tensor, index), {})
    result = tensor.stored[index]
    parts = index if isinstance(index, tuple) else (index,)
    is_view = all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)
    return tensor.like(result) if is_view else result.float()


@handles_each(*named("cat concat concatenate stack hstack vstack"))
def _join(function: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    stored = [tensor.stored if isinstance(tensor, HalfWeight) else tensor for tensor in tensors]
    if all(isinstance(tensor, HalfWeight) for tensor in tensors) and kwargs.get("out") is None:
        return tensors[0].like(function(stored, *args, **kwargs))
    if any(tensor.dtype == torch.float32 for tensor in stored):  # torch widens what it joins to float32
        return function(stored, *args, **kwargs)
    return call_widened(function, (tensors, *args), kwargs)


# --- selections: only the chosen rows are widened -------------------------------------------------------------------


@handles_each(*named("index_select gather take take_along_dim"))
def _select(function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(tensor, HalfWeight):
        return call_widened(function, (tensor, *args), kwargs)
    return function(tensor.stored, *args, **kwargs).float()


@handles(torch.nn.functional.embedding)
def _embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None:  # renormalises the weight in place
        args = (indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return call_widened(torch.nn.functional.embedding, args, {})
    assert isinstance(weight, HalfWeight)
    return kernels.embedding(indices, weight.stored)


# --- conversions and questions --------------------------------------------------------------------------------------


@handles(Tensor.to)
def _to(tensor: Any, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
    args = tuple(map(without_numbers, args))
    if not isinstance(tensor, HalfWeight):
        return tensor.to(*args, copy=copy, **{key: without_numbers(value) for key, value in kwargs.items()})
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device not in (None, tensor.stored.device):
        return tensor.stored.to(device).to(dtype or torch.float32)
    if dtype in (None, torch.float32):
        return tensor.like(tensor.stored.clone()) if copy else tensor
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


@handles_each(
    *(Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.element_size, Tensor.is_shared),
    *(accessor("nbytes").__get__, accessor("itemsize").__get__, Tensor.is_pinned),
)
def _storage(function: Any, weight: HalfWeight) -> Any:
    """The bytes at rest are what memory reports, serialisers and tie detection want to know."""
    if torch._guards.TracingContext.try_get() is not None or _imitates(sys._getframe(2)):
        with torch._C.DisableTorchFunctionSubclass():
            return function(weight)
    return function(weight.stored)


def _imitates(caller: types.FrameType) -> bool:
    """Whether torch asks because it imitates the wrapper and what is inside, for torch.compile or torch.export."""
    return caller.f_globals.get("__name__") == "torch._subclasses.meta_utils"


# --- writes ---------------------------------------------------------------------------------------------------------


@handles(Tensor.copy_)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, HalfWeight):
        return target.overwrite(source)
    assert isinstance(source, HalfWeight)
    return target.copy_(source.stored, non_blocking)


@handles(accessor("data").__set__)
def _set_data(target: Tensor, source: Tensor) -> None:
    if not isinstance(target, HalfWeight):
        raise UpcastError(
            "a weight stored in float16 as the .data of an ordinary tensor; their storages differ. "
            "Assign a new torch.nn.Parameter instead."
        )
    if isinstance(source, HalfWeight):
        target.stored = source.stored.view(target.stored.shape)
    else:
        target.overwrite(source)


@handles(Tensor.share_memory_)
def _share_memory(weight: HalfWeight) -> HalfWeight:
    weight.stored.share_memory_()
    return weight


@handles(Tensor.requires_grad_)
def _requires_grad(weight: HalfWeight, requires_grad: bool = True) -> HalfWeight:
    _refuse_grad(requires_grad)
    return weight


@handles(accessor("requires_grad").__set__)
def _set_requires_grad(weight: HalfWeight, requires_grad: bool) -> None:
    _refuse_grad(requires_grad)


def _refuse_grad(requires_grad: bool) -> None:
    if requires_grad:
        raise UpcastError(
            "requires_grad=True on a weight stored in float16; such weights are frozen, gradients flow through them "
            "but not into them. Leave it alone with upcast.patch(model, keep=[...]), or upcast.unpatch(model) first."
        )

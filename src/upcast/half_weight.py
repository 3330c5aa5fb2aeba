"""HalfWeight: a float32 tensor that is stored in float16.

To everyone who looks, a HalfWeight is a float32 tensor: ``dtype``, arithmetic, gradients through it. Its numbers
live in ``stored``, an ordinary float16 tensor that is never packed or rearranged, so a float16 checkpoint is used
as it is. Operations arrive in ``__torch_function__``; those in ``HANDLERS`` (filled by `upcast.ops`) widen only
the tile, the rows or the experts in use. Any other operation sees a float32 copy, and the copy is counted.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from upcast.errors import UpcastError
from upcast.kernels.reference import FLOAT16_MAX

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""torch function -> handler with the same signature, for operations with a HalfWeight among their arguments."""

# Questions about the tensor rather than about its numbers: answered by the wrapper, which knows shape and dtype.
_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.stride, torch.Tensor.dim_order),
    *(torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.storage_offset, torch.Tensor.get_device),
    *(torch.Tensor.__len__, torch.Tensor.__hash__, torch.Tensor.register_hook, torch.numel),
    torch._has_compatible_shallow_copy_type,  # asked for every parameter by Module.to
    *(
        getattr(home, name)
        for home in (torch, torch.Tensor)
        for name in dir(home)
        if name.startswith(("is_", "_is_")) and name != "is_nonzero"
    ),
}


class Fallbacks:
    """Counts operations that had to widen a HalfWeight whole. One per patched model, shared by its weights."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.largest: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, operation: str, elements: int) -> None:
        """Note one float32 copy of ``elements`` numbers made for ``operation``."""
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            self.largest[operation] = max(self.largest.get(operation, 0), 4 * elements)

    def __reduce__(self) -> tuple[type["Fallbacks"], tuple[()]]:
        return (Fallbacks, ())  # a copy of a model starts its own count

    def __str__(self) -> str:
        rows = [f"{name}: {n} calls, up to {self.largest[name]:,} bytes" for name, n in sorted(self.calls.items())]
        return "\n".join(rows) or "none"


class HalfWeight(torch.Tensor):
    """A float32 tensor stored in float16.

    Args:
        stored: the float16 tensor, of any shape and strides; it is used as it is, without a copy.
        fallbacks: where float32 copies are counted.
    """

    stored: torch.Tensor
    fallbacks: Fallbacks
    row_major: bool  # a matrix whose rows are contiguous: the kernels take it as it is
    twin: int  # 0: a storage of its own; 1 and 2: the first and a later weight of equal ones that share a storage

    @staticmethod
    def __new__(cls, stored: torch.Tensor, fallbacks: Fallbacks | None = None) -> "HalfWeight":
        if stored.dtype != torch.float16:
            raise UpcastError(f"a HalfWeight of {stored.dtype}; it stores float16. Convert the tensor with .half().")
        # torch's own stub of _make_wrapper_subclass is untyped
        self: HalfWeight = torch.Tensor._make_wrapper_subclass(
            cls,
            stored.shape,
            strides=stored.stride(),
            storage_offset=stored.storage_offset(),
            dtype=torch.float32,
            device=stored.device,
            requires_grad=False,
        )
        return self

    def __init__(self, stored: torch.Tensor, fallbacks: Fallbacks | None = None) -> None:
        self.stored = stored
        self.row_major = stored.dim() == 2 and stored.stride(1) == 1
        self.fallbacks = Fallbacks() if fallbacks is None else fallbacks
        self.twin = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **kwargs) if kwargs else handler(*args)
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return call_widened(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The slow door: what reaches a HalfWeight from inside torch, past `__torch_function__`."""
        if func is torch.ops.aten.detach.default:
            return args[0].like(args[0].stored.detach())
        if func in HANDLERS:  # an operator of ours
            return HANDLERS[func](*args)
        return call_widened(func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Tell torch.compile and torch.export what to trace: the float16 tensor inside."""
        return ["stored"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "HalfWeight":
        from upcast.exported import around  # which needs HalfWeight

        return around(inner["stored"])

    def like(self, stored: torch.Tensor) -> "HalfWeight":
        """Return ``stored`` as a HalfWeight that counts its fallbacks where this one does."""
        return HalfWeight(stored, self.fallbacks)

    def widened(self) -> torch.Tensor:
        """Return a new float32 tensor with these numbers (exact: every float16 is a float32)."""
        return self.stored.float()

    def overwrite(self, source: torch.Tensor) -> "HalfWeight":
        """Replace the numbers by ``source`` (same shape, any float dtype), rounded to nearest.

        Raises:
            UpcastError: ``source`` has a value beyond 65504 or not finite; nothing has been changed then.
        """
        source = source.stored if isinstance(source, HalfWeight) else source.detach().expand(self.stored.shape)
        if out_of_range(source):
            raise UpcastError(
                f"writing values beyond {FLOAT16_MAX:.0f} or not finite into a weight stored in float16; float16 "
                "ends there. Patch the model after the change, or leave this tensor alone with keep=[...]."
            )
        if self.twin:  # the others must not change with us
            self.stored, self.twin = torch.empty_like(self.stored), 0
        self.stored.copy_(source)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "HalfWeight":
        if id(self) in memo:
            copied: HalfWeight = memo[id(self)]
            return copied
        memo[id(self)] = new = _rebuild(
            copy.deepcopy(self.stored, memo), copy.deepcopy(self.fallbacks, memo), *self._flags()
        )
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_rebuild, (self.stored, self.fallbacks, *self._flags()))

    def _flags(self) -> tuple[int, bool]:
        return self.twin, isinstance(self, torch.nn.Parameter)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"HalfWeight(float32 {tuple(self.shape)} stored in float16:\n{self.stored})"


def _rebuild(stored: torch.Tensor, fallbacks: Fallbacks, twin: int, is_parameter: bool) -> HalfWeight:
    weight = parameter(stored, fallbacks) if is_parameter else HalfWeight(stored, fallbacks)
    weight.twin = twin
    return weight


def parameter(stored: torch.Tensor, fallbacks: Fallbacks) -> HalfWeight:
    """Return a HalfWeight that is also a ``torch.nn.Parameter`` (frozen)."""
    weight = HalfWeight(stored, fallbacks)
    weight._is_param = True  # what torch.nn.Parameter itself sets on tensor subclasses
    return weight


def out_of_range(source: torch.Tensor) -> bool:
    """Return whether ``source`` has a value beyond float16's largest, 65504, or one that is not finite."""
    if source.numel() == 0 or not source.is_floating_point():
        return False
    low, high = map(float, torch.aminmax(source.detach()))  # NaN propagates, so that the comparison fails for it too
    return not (low >= -FLOAT16_MAX and high <= FLOAT16_MAX)  # not in bfloat16, where 65504 is 65536


def call_widened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with a counted float32 copy of every HalfWeight; in-place results are written back."""
    copies: dict[int, tuple[HalfWeight, torch.Tensor]] = {}
    name = _name(func)

    def widen(value: Any) -> Any:
        if not isinstance(value, HalfWeight):
            return value
        if id(value) not in copies:
            value.fallbacks.count(name, value.stored.numel())
            with torch.inference_mode(False):  # inference tensors keep no version, and the version tells of writes
                copies[id(value)] = (value, value.widened())
        return copies[id(value)][1]

    wide_args, wide_kwargs = pytree.tree_map(widen, (args, kwargs))
    result = func(*wide_args, **wide_kwargs)
    for weight, wide in copies.values():
        if wide._version:  # an in-place operation wrote into the copy
            weight.overwrite(wide)
        if result is wide:
            result = weight
    return result


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))

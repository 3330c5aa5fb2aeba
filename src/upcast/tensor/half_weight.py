"""HalfWeight: a float32 tensor that is stored in float16.

To everyone who looks, a HalfWeight is a float32 tensor: ``dtype``, arithmetic, gradients through it. Its numbers live
in ``stored``, an ordinary float16 tensor that is never packed or rearranged, so a float16 checkpoint is used as it is.
Operations arrive in ``__torch_function__``; those in ``HANDLERS`` (filled by `upcast.tensor.view_ops`) upcast only the
tile, the rows or the experts in use. Any other operation sees a float32 copy, and the copy is counted.

Only a parameter and its views are HalfWeights; they share a `Store`. Every copy is an ordinary float32 tensor. Where
float16 cannot serve (raw memory, values out of its range, training), the store dissolves into float32 memory and the
HalfWeights that stand for it become ordinary tensors: see `upcast.tensor.materialize`.
"""

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from upcast.core import functional, memory_layout
from upcast.core.errors import UpcastError
from upcast.kernels.reference import FLOAT16_MAX
from upcast.tensor import materialize, torchscript
from upcast.tensor.store import BLURRED, Fallbacks, Region, Store, region_of

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""torch function -> handler with the same signature, for operations with a HalfWeight among their arguments."""

OTHERWISE: dict[str, Callable[..., Any]] = {}
"""What `upcasting` does with functions ("function") and operators ("operator") that have no handler, and what `export`
puts around the tensor inside when torch imitates a weight ("unflatten")."""

# Questions about the tensor rather than about its numbers: answered by the wrapper, which knows shape and dtype.
_METADATA = {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.stride, torch.Tensor.dim_order),
    *(torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.storage_offset, torch.Tensor.get_device),
    *(torch.Tensor.__len__, torch.Tensor.__hash__, torch.numel),
    torch._has_compatible_shallow_copy_type,  # asked for every parameter by Module.to
    *(
        getattr(home, name)
        for home in (torch, torch.Tensor)
        for name in dir(home)
        if name.startswith(("is_", "_is_")) and name != "is_nonzero"
    ),
}


_FUNCTIONS = {name: value for name, value in vars(functional.F).items() if type(value) is FunctionType}


def _meant(func: Any) -> Any:
    """Return the function of torch.nn.functional that calls itself ``func``: it looks up its name, now another's."""
    name = next((name for name in _FUNCTIONS if vars(F).get(name) is func), None)
    return func if name is None else _FUNCTIONS[name]


class HalfWeight(torch.Tensor):
    """A float32 tensor stored in float16.

    Code that makes another with ``type(parameter)(data, requires_grad=...)`` gets an ordinary ``torch.nn.Parameter``.

    Args:
        stored: the float16 tensor, of any shape and strides; it is used as it is, without a copy.
        fallbacks: where float32 copies are counted.

    Examples:
        >>> model = upcast.patch(torch.nn.Linear(8, 4).eval())
        >>> isinstance(model.weight, upcast.HalfWeight), model.weight.dtype, model.weight.stored.dtype
        (True, torch.float32, torch.float16)
        >>> type(model.weight.detach().clone()).__name__  # every copy is an ordinary float32 tensor
        'Tensor'
    """

    store: Store
    region: Region | None  # where it lies in the store's memory; None: it is the whole of it
    row_major: bool  # a whole matrix whose rows are contiguous: the kernels take it as it is
    wants_grad: bool  # what requires_grad says; it is an ordinary parameter before a gradient arrives
    source: "HalfWeight | None" = None  # what `detach` was asked of

    @staticmethod
    def __new__(
        cls, stored: torch.Tensor, fallbacks: Fallbacks | None = None, *, requires_grad: bool | None = None
    ) -> Any:
        if requires_grad is not None:
            return torch.nn.Parameter(stored, requires_grad)
        if stored.dtype != torch.float16:
            raise UpcastError(f"a HalfWeight of {stored.dtype}; it stores float16. Convert the tensor with .half().")
        return HalfWeight.wrapper(cls, stored, stored.device)

    @staticmethod
    def wrapper(kind: type["HalfWeight"], outline: torch.Tensor, device: torch.device) -> Any:
        """Return a float32 tensor of the class, without memory, that lies as ``outline`` does."""
        # torch's own stub of _make_wrapper_subclass is untyped
        self = torch.Tensor._make_wrapper_subclass(
            kind,
            outline.shape,
            strides=outline.stride(),
            storage_offset=outline.storage_offset(),
            dtype=torch.float32,
            device=device,
            requires_grad=False,
        )
        _refuse_raw_memory(self)
        return self

    def __init__(self, stored: torch.Tensor, fallbacks: Fallbacks | None = None) -> None:
        self.store, self.region = Store(stored, Fallbacks() if fallbacks is None else fallbacks), None
        self.row_major = stored.dim() == 2 and stored.stride(1) == 1
        self.wants_grad = False

    @property
    def stored(self) -> torch.Tensor:
        """The float16 tensor with these numbers, in the memory where they live."""
        half = self.store.half
        if half is None:
            raise UpcastError(
                "a weight that is no longer stored in 16 bits or fewer; it has become float32. Look at it anew."
            )
        return half if self.region is None else self.region.of(half)

    @property
    def outline(self) -> torch.Tensor:
        """A tensor that lies in memory as ``stored`` does; of a view of it `like` makes one of this weight."""
        return self.stored

    @property
    def operand(self) -> Any:
        """The numbers as `upcast.kernels` take them."""
        return self.stored

    def memory_for_attention(self) -> torch.Tensor:
        """Return the numbers in a dtype that attention takes as keys and values."""
        return self.stored

    def memory(self) -> torch.Tensor:
        """Return an ordinary tensor with the numbers: the stored one, or the float32 one once they have dissolved."""
        return self.stored if self.store.held else materialize.alias(self)

    def at_rest(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a question about the memory's size or place is answered with."""
        return function(self.stored, *args)

    @property
    def fallbacks(self) -> Fallbacks:
        """Where float32 copies are counted."""
        return self.store.fallbacks

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(types) > 1 and not all(issubclass(kind, torch.Tensor) for kind in types):
            return NotImplemented  # what is no tensor, as one that is yet to be loaded, knows what it stands for
        if Store.learning and torch.is_grad_enabled() and not torch.compiler.is_compiling() and _computes(func):
            _begin_training((args, kwargs))
        if Store.dissolved:
            args, kwargs = resolved(args, kwargs or {})
            if not any(isinstance(each, HalfWeight) for each in pytree.tree_leaves((args, kwargs))):
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and not (kwargs and isinstance(kwargs.get("out"), HalfWeight)):
            if not kwargs:
                return handler(*args)
            args, kwargs = _in_order(args, kwargs)
            return handler(*args, **kwargs)
        if func in _METADATA or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        meant = _meant(func)
        if meant is not func:
            return cls.__torch_function__(meant, types, args, kwargs)
        return OTHERWISE["function"](func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The slow door: what reaches a HalfWeight from inside torch, past `__torch_function__`."""
        if func in HANDLERS:  # an operator of ours
            return HANDLERS[func](*args)
        first = args[0] if args else None
        if isinstance(first, HalfWeight) and first.store.held and (func.is_view or func in _ALIASING):
            return first.like(func(first.outline, *args[1:], **(kwargs or {})))
        return OTHERWISE["operator"](func, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Tell torch.compile and torch.export what to trace: the float16 tensor inside."""
        return ["stored"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "HalfWeight":
        made: HalfWeight = OTHERWISE["unflatten"](inner["stored"])
        return made

    def like(self, part: Any) -> Any:
        """Return ``part``, a view of ``outline`` (or several), as a view of this weight."""
        if not isinstance(part, torch.Tensor):
            return type(part)(map(self.like, part)) if type(part) in (list, tuple) else tuple(map(self.like, part))
        return self.over(self.store, region_of(part, self.store.outline), part)

    @classmethod
    def over(cls, store: Store, region: Region | None, part: torch.Tensor | None = None) -> "HalfWeight":
        """Return what stands for a region of ``store``; ``part``: its float16 tensor, where that is at hand."""
        if part is None:
            half = store.half
            assert half is not None
            part = half if region is None else region.of(half)
        weight = HalfWeight(part, store.fallbacks)
        weight.store, weight.region = store, region
        weight.row_major = weight.row_major and region is None
        return weight

    def upcast(self) -> torch.Tensor:
        """Return a new float32 tensor with these numbers (exact: every float16 is a float32)."""
        return self.stored.float() if self.store.held else materialize.alias(self).clone()

    def overwrite(self, source: torch.Tensor, *, update: bool = False) -> "HalfWeight":
        """Replace the numbers by ``source`` (any float dtype, of a shape that broadcasts), rounded to nearest.

        Where a number is beyond 65504 or not finite, the weight becomes float32 first, and says so. So it does where
        this is an ``update`` of the numbers that are there, and rounding would undo it, or blur one after another.
        """
        source = memory_layout.plain(source.detach().expand(self.shape))
        if isinstance(source, HalfWeight):
            source = source.memory()
        if out_of_range(source):
            materialize.dissolve(self, materialize.OUT_OF_RANGE)
        elif update and self.store.held and self._is_lost(source, self.stored):
            materialize.dissolve(self, materialize.SMALL_STEPS)
        with torch.no_grad():
            if self.store.held:
                self.store.unshare()
            self.memory().copy_(source)
            self.store.handed = None  # this write was looked at
        return self

    def hand_out(self) -> torch.Tensor:
        """Return the tensor that holds the numbers, for a state dict, whose reader may write into it.

        Nobody asks then whether a step is too small for float16; from the fourth state dict on, if those before were
        written, it is a float32 one.
        """
        self.reclaim()
        store = self.store
        store.unshare()
        if store.half is not None and not store.half.is_inference():
            written = store.handed not in (None, store.half._version)
            store.blurred += int(written)
            store.handed = store.half._version
            if written and store.blurred >= BLURRED:
                materialize.dissolve(self, materialize.SMALL_STEPS)
        return self.memory()

    def reclaim(self) -> bool:
        """Store in float16 what ``.data =`` shared with a tensor that is gone by now; return whether it is again."""
        borrowed, former = self.store.borrowed(), self.store.former
        if borrowed is not None and former is not None:
            if out_of_range(borrowed):
                materialize.keep(self, materialize.OUT_OF_RANGE)
            elif self._is_lost(borrowed, former):
                materialize.keep(self, materialize.SMALL_STEPS)
            else:
                self.store.take_over(borrowed)
        return self.store.held

    def __hash__(self) -> int:
        torchscript.look(self)
        return id(self)

    def _is_lost(self, source: torch.Tensor, stored: torch.Tensor) -> bool:
        """Whether rounding gives most of the changed numbers back, or is for the fourth time a part of the step."""
        rounded = source.to(torch.float16)
        changed = source != stored
        undone = changed & (rounded == stored)
        blur, step = (rounded - source).norm(), (source - stored).norm()
        self.store.blurred += int(blur > _BLUR * step)
        return self.store.blurred > BLURRED or 2 * int(undone.count_nonzero()) > int(changed.count_nonzero())

    def __copy__(self) -> torch.Tensor:
        """Share the memory, as torch's shallow copies do."""
        shared: torch.Tensor
        if not isinstance(self, torch.nn.Parameter):
            shared = self.like(self.outline) if self.reclaim() else materialize.alias(self)
        elif self.reclaim():
            shared = rebuild(self.store, self.region, self.wants_grad)
        else:
            shared = torch.nn.Parameter(materialize.alias(self), self.wants_grad)
        shared.__dict__.update(self.attributes())
        return shared

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._duplicate(memo) if isinstance(self, torch.nn.Parameter) else self.upcast()
        copied: torch.Tensor = memo[id(self)]
        return copied

    def _duplicate(self, memo: dict[int, Any]) -> torch.Tensor:
        bare = not memo  # what is copied as a part of something finds that there
        if bare or not self.reclaim() or materialize.copied_by_an_adapter():
            return torch.nn.Parameter(self.upcast(), self.wants_grad)
        return rebuild(copy.deepcopy(self.store, memo), self.region, self.wants_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the float32 tensor or parameter that it is; modules keep float16 (`upcast.tensor.pickling`)."""
        plain = self.upcast()
        if isinstance(self, torch.nn.Parameter):
            plain = torch.nn.Parameter(plain, self.wants_grad)
        plain.__dict__.update(self.attributes())
        return plain.__reduce_ex__(protocol)

    def attributes(self) -> dict[str, Any]:
        """Return what users and libraries have hung on this parameter."""
        return {key: value for key, value in self.__dict__.items() if key not in OURS}

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        where = f"stored in {self.store.name}" if self.store.held else "in float32"
        return f"{type(self).__name__}(float32 {shape} {where}:\n{self.memory()})"


def resolved(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return the arguments of a torch function with ordinary tensors in place of dissolved weights."""

    def gone(value: Any) -> bool:
        return isinstance(value, HalfWeight) and not value.store.held and not value.reclaim()

    def resolve(weight: Any) -> Any:
        return materialize.alias(weight) if gone(weight) and not materialize.become(weight) else weight

    if not any(map(gone, pytree.tree_leaves((args, kwargs)))):
        return args, kwargs
    resolved_args, resolved_kwargs = pytree.tree_map_only(HalfWeight, resolve, (args, kwargs))
    return resolved_args, resolved_kwargs


def _computes(func: Any) -> bool:
    """Whether ``func`` makes of a weight what a gradient can come back through."""
    if getattr(func, "__name__", "") in ("__get__", "__set__"):
        return func in _TURNED
    return func not in _METADATA and func not in _LOOKS


def _begin_training(values: Any) -> None:
    """Make float32 what requires grad, of models that went into training mode after the patch."""
    for each in pytree.tree_leaves(values):
        if isinstance(each, HalfWeight) and each.wants_grad and each.fallbacks.learning:
            materialize.materialize(each, materialize.TRAINING)


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with those that torch calls ``input`` and ``other`` at their places, the first two."""
    kwargs = dict(kwargs)
    if "input" in kwargs:
        args = (kwargs.pop("input"), *args)
    if "other" in kwargs and len(args) == 1:
        args = (*args, kwargs.pop("other"))
    return args, kwargs


# What of torch reads the wrapper's memory, which there is none of, raises an error in place of reading at address zero.
_refuse_raw_memory = getattr(torch._C, "_set_throw_on_mutable_data_ptr", lambda _: None)
_BLUR = 0.05  # the part of a step that rounding may be
OURS = frozenset(
    ("store", "region", "row_major", "wants_grad", "packed", "source", "_is_param")
)  # what a HalfWeight's own __dict__ holds
_TURNED = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}
_LOOKS = {
    *(torch.Tensor.detach, torch.detach, torch.Tensor.to, torch.Tensor.float, torch.Tensor.cpu, torch.Tensor.type),
    *(torch.Tensor.requires_grad_, torch.Tensor.element_size, torch.Tensor.share_memory_, torch.Tensor.data_ptr),
}
Store.kind = HalfWeight
_ALIASING = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


def rebuild(store: Store, region: Region | None, wants_grad: bool) -> HalfWeight:
    """Return a parameter on ``store``."""
    weight = store.kind.over(store, region)
    weight._is_param = True
    weight.wants_grad = wants_grad
    return weight


def parameter(stored: torch.Tensor, fallbacks: Fallbacks, wants_grad: bool = False) -> HalfWeight:
    """Return a HalfWeight that is also a ``torch.nn.Parameter``."""
    weight = HalfWeight(memory_layout.plain(stored), fallbacks)
    weight._is_param = True  # what torch.nn.Parameter itself sets on tensor subclasses
    weight.wants_grad = wants_grad
    return weight


def out_of_range(source: torch.Tensor) -> bool:
    """Return whether ``source`` has a value beyond float16's largest, 65504, or one that is not finite."""
    if source.numel() == 0 or source.dtype == torch.bool or source.is_complex():
        return False
    low, high = map(float, torch.aminmax(source.detach()))  # NaN propagates, so that the comparison fails for it too
    return not (low >= -FLOAT16_MAX and high <= FLOAT16_MAX)  # not in bfloat16, where 65504 is 65536

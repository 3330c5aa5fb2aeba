"""The mode that runs policies other than safe: each operation sees float32 or float16, as its class asks.

To the model's code everything looks like plain ``.half()``: weights and activations say float16. Behind that, the
result of an upcast operation is a float32 tensor that *stands for* a float16 one (it carries a mark), and goes on
unrounded. An operation whose class is not upcast gets its inputs in float16, rounded then and there, and gives what
``.half()`` would. What the model itself computes in float32 stays float32. What belongs to no class follows its inputs.

A `Session` is a `TorchFunctionMode` that the forward of a patched module enters (`upcast.policy.module_scope`): it
exists in one thread, for one call, and ends with it.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upcast.core.torch_modes import function_modes
from upcast.kernels.reference import FLOAT16_MAX
from upcast.policy import op_classes
from upcast.policy.policy import ALL
from upcast.tensor import view_ops
from upcast.tensor.half_weight import HANDLERS, HalfWeight

# The marks of a float32 tensor inside a session.
FOR_HALF = "for float16"  # an activation: the model's code takes it for float16
FOR_FLOAT = "for float32"  # the model's code asked for float32; it comes from upcast operations and need not be rounded
STORED = "stored"  # a parameter, a buffer or an input: as wide as the operation that uses it

Observer = Callable[["Session", str | None, str, list[Tensor], Any], None]

_VIEWS = frozenset(f for f, handler in HANDLERS.items() if getattr(handler, "func", None) is view_ops._view) | {
    Tensor.__getitem__,
    *view_ops.named("detach as_strided unfold split_with_sizes"),
}
_FILLS = frozenset(["full", "full_like", "new_full", "masked_fill", "fill", "where", "tensor", "scalar_tensor"])
_SUMMED = frozenset(["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv"])
_LOWEST = torch.finfo(torch.float32).min
_HALVES = (torch.float16, torch.float32)
_NESTS = (tuple, list, dict)

_local = threading.local()  # .session: the innermost one of this thread


def current() -> "Session | None":
    """Return the session that this thread is in, if any."""
    return getattr(_local, "session", None)


def mark(tensor: Tensor, kind: str | None) -> Tensor:
    """Put a mark on a float32 tensor (None takes it off)."""
    if kind is None:
        tensor.__dict__.pop("_upcast", None)
    else:
        tensor._upcast = kind  # type: ignore[attr-defined]
    return tensor


def mark_of(tensor: Tensor) -> str | None:
    """Return the mark of a tensor."""
    return getattr(tensor, "_upcast", None)  # not by __dict__, which a tensor without marks has none of until asked


def mark_buffers(module: nn.Module) -> None:
    """Mark a module's float32 buffers as wide as the operation that uses them."""
    for buffer in module._buffers.values():
        if buffer is not None and buffer.dtype == torch.float32:
            mark(buffer, STORED)


class Frame:
    """One module at work: its name, the classes upcast in it, and the class that all its operations belong to."""

    __slots__ = ("classes", "complete", "name", "op_class")

    def __init__(self, name: str, classes: frozenset[str], op_class: str | None) -> None:
        self.name, self.classes, self.op_class = name, classes, op_class
        self.complete = classes == ALL


class Session(TorchFunctionMode):
    """One call of a patched model under a policy.

    Args:
        owner: what tells the sessions of different models apart. Its ``observer``, if not None, is called after each
            operation with (session, op class, function's name, its tensors, its result); it may come and go.
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.owner = owner
        self.frames: list[Frame] = []
        self.before: Session | None = None
        self.depth = 0  # how many modes there were before
        self.ended_by_upcast = False  # by an interruption, after which torch may yet put it back

    def __enter__(self) -> "Session":
        self.before, self.depth = current(), torch._C._len_torch_function_stack()
        super().__enter__()  # type: ignore[no-untyped-call]
        _local.session = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _local.session = self.before
        if function_modes() > self.depth:  # torch takes it off and on, and may have been interrupted
            super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def run(self, function: Callable[[], Any]) -> Any:
        """Return what ``function`` gives within the session, which an interruption of its end ends as well."""
        before, depth = current(), function_modes()
        try:
            with self:
                return function()
        except BaseException:
            self.ended_by_upcast = True
            while torch._C._len_torch_function_stack() > depth:
                torch._C._pop_torch_function_stack()
            _local.session = before
            raise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _local.session is not self:  # a model inside this one has its own
            return func(*args, **kwargs)
        known = op_classes.known(func)
        if known.asks:
            return reported(args[0]) if func == _DTYPE else _answered(func, args, kwargs)
        frame, observer = self.frames[-1], self.owner.observer
        if known.name in _CONVERSIONS:
            result = _converted(frame, func, args, kwargs)
            if observer is not None:
                observer(self, frame.op_class, known.name, [args[0]], result)
            return result
        call = Call(frame, func, known, args, kwargs)
        call.observed = observer is not None
        result = call.run()
        if observer is not None:
            observer(self, call.op_class, known.name, call.tensors, result)
        return result


class Call:
    """One operation: its tensors, its class, and how it is to run."""

    observed = False  # then float16 products are summed by our kernels: torch's own way is several times slower

    def __init__(self, frame: Frame, func: Any, known: op_classes.Known, args: Any, kwargs: dict[str, Any]) -> None:
        self.frame, self.func, self.known, self.args, self.kwargs = frame, func, known, args, kwargs
        self.tensors = _collect(args, [])
        if kwargs:
            _collect(kwargs.values(), self.tensors)
        self.op_class = frame.op_class or (known.op_class if known.decided else _class_of(known, self.tensors))

    def run(self) -> Any:
        """Run the operation as the policy asks."""
        if self.kwargs and (out := self.kwargs.pop("out", None)) is not None:
            return out.copy_(self.run())
        if self.known.writes and self.tensors:
            return self._in_place()
        if self.op_class is None and self.func in _VIEWS and self.tensors:
            kind = STORED if isinstance(self.tensors[0], HalfWeight) else mark_of(self.tensors[0])
            return _marked(self.func(*self.args, **self.kwargs), kind)  # as wide as what it looks at
        return self._widely() if self._wide() else self._in_float16()

    def _widely(self) -> Any:
        args, kwargs = self._scalars(self.args), self._float_kwargs()
        if any(map(_is_half, self.tensors)):
            args, kwargs = _map(args, _upcast), _map(kwargs, _upcast)
        result = self.func(*args, **kwargs)
        if self.op_class is None and not self._ours():
            return result
        return _marked(result, FOR_FLOAT if self._asks_float() else FOR_HALF)

    def _in_float16(self) -> Any:
        if self.observed and self.known.name in _SUMMED and self._all_half():
            wide = _map(self.args, _rounded), _map(self.kwargs, _rounded)
            return self.func(*wide[0], **wide[1]).half()  # as torch does it: sums in float32, rounded once
        if not any(map(_stands_for_half, self.tensors)):
            return self.func(*self.args, **self.kwargs)
        narrow = _downcast_but_weights if any(map(_asks_float, self.tensors)) else _downcast
        return self.func(*_map(self.args, narrow), **_map(self.kwargs, narrow))

    def _all_half(self) -> bool:
        return all(reported(tensor) == torch.float16 for tensor in self.tensors)

    def _wide(self) -> bool:
        if self.op_class is not None:
            return self.op_class in self.frame.classes
        return self.frame.complete or any(mark_of(tensor) in (FOR_HALF, FOR_FLOAT) for tensor in self.tensors)

    def _ours(self) -> bool:
        """Whether a number that stands for a float16 one takes part, or float16 is asked for."""
        if self.kwargs.get("dtype") is torch.float16:
            return True
        return any(isinstance(t, HalfWeight) or _is_half(t) or mark_of(t) for t in self.tensors)

    def _asks_float(self) -> bool:
        dtype = self.kwargs.get("dtype")
        return dtype == torch.float32 if dtype in _HALVES else any(map(_asks_float, self.tensors))

    def _in_place(self) -> Any:
        target = self.tensors[0]
        if isinstance(target, HalfWeight) or not target.is_floating_point():
            return self.func(*self.args, **self.kwargs)
        half = target.dtype == torch.float16
        wide = not half if self.op_class is None else self._wide()
        convert = _upcast if wide or (not half and mark_of(target) is None) else _downcast
        rest = self._scalars(self.args[1:]) if convert is _upcast else self.args[1:]
        args, kwargs = _map(rest, convert), _map(self.kwargs, convert)
        if half != (convert is _upcast):
            result = self.func(target, *args, **kwargs)
            return target if isinstance(result, Tensor) else result
        other = convert(target)  # computed in the other type, then stored in the target's
        result = self.func(other, *args, **kwargs)
        target.copy_(other)
        return _marked(other, FOR_HALF) if isinstance(result, Tensor) else result

    def _scalars(self, args: Any) -> Any:
        """Float16's lowest, as masks are filled with it, is float32's lowest in a tensor of float32."""
        if self.known.name not in _FILLS:
            return args
        return tuple(_LOWEST if isinstance(arg, float) and arg == -FLOAT16_MAX else arg for arg in args)

    def _float_kwargs(self) -> dict[str, Any]:
        if self.kwargs.get("dtype") is torch.float16:
            return {**self.kwargs, "dtype": torch.float32}
        return self.kwargs


# --- tensors ----------------------------------------------------------------------------------------------------------


def reported(tensor: Tensor) -> torch.dtype:
    """Return the dtype that plain ``.half()`` would give the tensor: what the model's code is told."""
    return torch.float16 if _stands_for_half(tensor) else tensor.dtype


def _asks_float(tensor: Tensor) -> bool:
    """Whether the model's code takes the tensor for float32 (a number without dimensions does not count)."""
    plain = type(tensor) is not HalfWeight and tensor.dtype == torch.float32
    return plain and mark_of(tensor) in (None, FOR_FLOAT) and tensor.dim() > 0


def _marked(result: Any, kind: str | None) -> Any:
    """Put a mark on what is float32 in an operation's result; return the result."""
    if kind is not None:
        for tensor in (result,) if type(result) is Tensor else _collect((result,), []):
            if type(tensor) is not HalfWeight and tensor.dtype is torch.float32:
                mark(tensor, kind)
    return result


def _is_half(tensor: Tensor) -> bool:
    """Whether the tensor is float16 itself."""
    return type(tensor) is not HalfWeight and tensor.dtype is torch.float16


def _stands_for_half(tensor: Tensor) -> bool:
    """Whether the tensor is a number of another type, or a weight, in place of float16."""
    return isinstance(tensor, HalfWeight) or mark_of(tensor) in (FOR_HALF, STORED)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if _is_half(tensor) else tensor


def _downcast(tensor: Tensor) -> Tensor:
    if isinstance(tensor, HalfWeight):
        return tensor.memory().half()
    return tensor.half() if mark_of(tensor) in (FOR_HALF, STORED) else tensor


def _rounded(tensor: Tensor) -> Tensor:
    """The numbers that float16 has, in float32; a weight as the kernels take it."""
    return tensor if isinstance(tensor, HalfWeight) else _downcast(tensor).float()


def _downcast_but_weights(tensor: Tensor) -> Tensor:
    """Next to float32 that the model asked for, a weight is one that it upcast with ``weight.float()``."""
    return tensor if isinstance(tensor, HalfWeight) else _downcast(tensor)


def _collect(values: Any, found: list[Tensor]) -> list[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            _collect(each, found)
    return found


def _answered(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the answer to a question about a tensor; ``x.T`` and the like are tensors as wide as ``x``."""
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and type(result) is not HalfWeight and mark_of(args[0]) is not None:
        mark(result, mark_of(args[0]))
    return result


def _map(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a tuple, list or dict, and those in it, with its tensors changed."""
    if type(values) is dict:
        return dict(zip(values, _map([*values.values()], change), strict=True)) if values else values
    changed = [
        change(each) if isinstance(each, Tensor) else _map(each, change) if type(each) in _NESTS else each
        for each in values
    ]
    return changed if type(values) is list else tuple(changed)


def _class_of(known: op_classes.Known, tensors: list[Tensor]) -> str | None:
    """Return the class of a function whose arguments have a say in it."""
    if op_classes.of_activations(known.name):
        return known.op_class if _two_activations(tensors) else None
    return "linear" if any(map(_is_weight, tensors)) else known.op_class


def _is_weight(tensor: Tensor) -> bool:
    return isinstance(tensor, (HalfWeight, nn.Parameter))


def _two_activations(tensors: list[Tensor]) -> bool:
    if len(tensors) < 2:
        return False
    a, b = tensors[:2]
    if isinstance(a, HalfWeight) or isinstance(b, HalfWeight) or a.shape != b.shape or not a.dim():
        return False
    floats = a.is_floating_point() and b.is_floating_point()
    return floats and STORED not in (mark_of(a), mark_of(b))


# --- conversions ------------------------------------------------------------------------------------------------------

_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_CONVERSIONS = {"to": None, "type_as": None, "float": torch.float32, "half": torch.float16}


def _converted(frame: Frame, func: Any, args: Any, kwargs: Any) -> Any:
    """Convert as the model's code asks, to what stands for the dtype it names."""
    tensor, dtype = args[0], _target(func, args, kwargs)
    if dtype not in _HALVES or not isinstance(tensor, Tensor):
        return func(*_reals(args), **kwargs) if dtype is not None else func(*args, **kwargs)
    if frame.op_class is not None and frame.op_class not in frame.classes:
        tensor = _downcast(tensor)
    keeps = frame.complete or (frame.op_class in frame.classes)
    result = _to_float(frame, tensor, keeps) if dtype == torch.float32 else _to_half(tensor, keeps)
    return result.clone() if kwargs.get("copy") and result is tensor else result


def _target(func: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    fixed = _CONVERSIONS[func.__name__]
    if fixed is not None:
        return fixed
    other = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(other, Tensor):
        return reported(other)
    options = {key: value for key, value in kwargs.items() if key in ("device", "dtype", "non_blocking")}
    dtype: torch.dtype | None = torch._C._nn._parse_to(*args[1:], **options)[1]
    return dtype


def _reals(args: Any) -> Any:
    """Arguments of a conversion to integers and other types, with what a tensor reports in place of the tensor."""
    return (args[0], *(reported(each) if isinstance(each, Tensor) else each for each in args[1:]))


def _to_float(frame: Frame, tensor: Tensor, keeps: bool) -> Tensor:
    if isinstance(tensor, HalfWeight):
        return tensor
    if tensor.dtype != torch.float32:
        return mark(tensor.float(), FOR_FLOAT if keeps and tensor.dtype == torch.float16 else None)
    kind = mark_of(tensor)
    if kind == STORED:
        if not frame.classes:
            return tensor.half().float()
        return mark(tensor.view_as(tensor), FOR_FLOAT if keeps else None)
    return mark(tensor.view_as(tensor), FOR_FLOAT) if kind == FOR_HALF else tensor


def _to_half(tensor: Tensor, keeps: bool) -> Tensor:
    if reported(tensor) == torch.float16:
        return tensor
    if tensor.dtype == torch.float32 and (keeps or mark_of(tensor) == FOR_FLOAT):
        return mark(tensor.view_as(tensor), FOR_HALF)
    return mark(tensor.float(), FOR_HALF) if keeps else tensor.half()

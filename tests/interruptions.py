"""Interruptions at a chosen line of upcast: raised there, or sent there for Python to deliver at its next check."""

import ctypes
import dis
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

import upcast
from upcast.core import messages
from upcast.guard import forward
from upcast.integrations import loading
from upcast.integrations.litgpt import generation as litgpt_generation
from upcast.integrations.litgpt import gpt, prefix_cache
from upcast.policy import mode
from upcast.tensor import store
from upcast.tensor.half_weight import HalfWeight

SOURCE = str(Path(upcast.__file__).parent)
_object, _c = ctypes.py_object, ctypes.pythonapi
_interrupt = ctypes.PYFUNCTYPE(None, _object)(("PyErr_SetInterrupt", _c))
_raise_in = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, _object, _object)(("PyThreadState_SetAsyncExc", _c))


class Timeout(BaseException):
    """What another thread raises in this one, as time limits do."""


class _Sent:
    """Sends where an attribute is read: after a call, `getattr` too, Python would deliver in what traces."""

    signal = property(_interrupt)
    thread = property(functools.partial(_raise_in, threading.get_ident(), Timeout))


KINDS = ("raised", "signal", "thread")
LOCKS: tuple[Any, ...] = (store.changes, loading._turn)


@functools.cache
def _leaving(code: CodeType) -> frozenset[int]:
    """Where ``code`` is about to leave a ``with``: Python delivers nothing before what leaves it was called."""
    starts, entered, found = dict(dis.findlinestarts(code)), set[int | None](), set[int]()
    line: int | None = None
    for step in dis.get_instructions(code):
        line = starts.get(step.offset, line)
        if step.opname in ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"):
            entered.add(line)
        elif step.offset in starts and line in entered:
            found.add(step.offset)
    return frozenset(found)


def run(action: Callable[[], Any], at: int = 0, kind: str = "raised", again: int = 0) -> int:
    """Run ``action`` and interrupt it at the ``at``-th line of upcast; return how many lines were run until then.

    ``again``: send a second one so many lines after the first, which ``kind`` must have sent too.
    """
    count, ours, sent = 0, dict[CodeType, bool](), _Sent()

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        code = frame.f_code
        if not ours.setdefault(code, code.co_filename.startswith(SOURCE)):
            return None
        if event == "line":
            count += 1
            if count == at or (again and count == at + again):
                if kind == "raised" and frame.f_lasti not in _leaving(code):
                    raise KeyboardInterrupt
                if not again:
                    sys.settrace(None)  # or it is delivered where the next line is traced, if not before
                    frame.f_trace = None
                if kind == "signal":
                    _ = sent.signal
                elif kind == "thread":
                    _ = sent.thread
        return trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        action()
        _arrive()
    except (KeyboardInterrupt, Timeout):
        pass
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
        if again:
            _free()
    return count


def _arrive() -> None:
    """Be called: what was sent at the last line arrives here, if not before, and not in what follows."""


def _free() -> None:
    """Give up locks that were left because an interruption was delivered in what traces, before a `with` was left."""
    for lock in LOCKS:
        while lock._is_owned():
            lock.release()


def picture(model: nn.Module) -> dict[str, Any]:
    """Return all that a patch changes in a model, as values that compare: classes, attributes, hooks, numbers."""
    return {
        name: {"": type(module), **{key: _shown(value) for key, value in sorted(vars(module).items())}}
        for name, module in model.named_modules()
    }


def _shown(value: Any) -> Any:
    if isinstance(value, HalfWeight):
        return ("half", value.wants_grad, _numbers(value.memory()), sorted(value.attributes()))
    if isinstance(value, Tensor):
        return (type(value), value.requires_grad, _numbers(value), sorted(vars(value)))
    if isinstance(value, dict):
        named = all(isinstance(key, str) for key in value)
        return (type(value).__name__, [(key if named else "", _shown(each)) for key, each in value.items()])
    if isinstance(value, (list, tuple)):
        return [_shown(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value)


def _numbers(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = tensor.detach().contiguous()
    return plain.dtype, tuple(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes()


def identities(model: nn.Module) -> dict[str, int]:
    """Return which objects the tensors of a model are."""
    tensors = [(name, each) for name, m in model.named_modules() for each in (m._parameters, m._buffers)]
    return {f"{name}.{key}": id(value) for name, each in tensors for key, value in each.items()}


def surroundings() -> dict[str, Any]:
    """Return what a load, a patch or a call may leave behind outside the model."""
    locals_ = (messages._silent, mode._local, forward._local, prefix_cache._kept, gpt._wanted)
    generation = [(name, getattr(owner, name)) for owner, name, _ in litgpt_generation._wrapped()]
    return {
        "environment": dict(os.environ),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "subclasses": torch._C._is_torch_function_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "LitGPT's functions": [(name, hasattr(function, "_upcast_original")) for name, function in generation],
        "locks": [lock._is_owned() for lock in LOCKS],
        "locals": [{k: v for k, v in vars(each).items() if v} for each in (*locals_, loading._local)],
    }

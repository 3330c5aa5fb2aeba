"""How a model runs under a policy other than safe: a forward for each of its modules, which says where it is.

The outermost of them opens the `Session`; the others tell it which module is at work. Installed per instance, like
every forward of ours, and taken away without a trace.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from upcast.core import forward_override as forwards
from upcast.core.errors import UpcastError
from upcast.core.forward_override import Forward
from upcast.core.module_tree import modules, named_modules
from upcast.core.pattern import matches
from upcast.policy.mode import STORED, Frame, Observer, Session, current, mark, mark_of
from upcast.policy.op_classes import module_class
from upcast.policy.policy import Policy
from upcast.tensor import autocast
from upcast.tensor.half_weight import HalfWeight


class Selection:
    """What the tracked modules of one model share: its policy, and who watches."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.observer: Observer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "observer": None}  # a copy of a model is not watched


class Tracked(Forward):
    """The forward of one module of a model under a policy; it copies and pickles with its module."""

    owner = "policy"

    def __init__(self, module: nn.Module, name: str, selection: Selection) -> None:
        super().__init__(module)
        self.name, self.selection = name, selection
        self.set_policy()

    @property
    def inner(self) -> Any:
        """The forward that someone else gave the module; not a fast one, nor one that looks on, of what is below."""
        below = self.below
        while isinstance(below, Forward) and (below.fast or below.looks_on):
            below = below.below
        return below

    def set_policy(self) -> None:
        """Take over the selection's policy."""
        self.frame = Frame(self.name, self.selection.policy.at(self.name), module_class(self.module))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise UpcastError(
                f"tracing a model under policy {self.selection.policy}; what runs in float32 is decided call by call. "
                "Patch it with policy='safe' for torch.compile and torch.export, or export the unpatched model."
            )
        session = current()
        if session is not None and session.owner is self.selection:
            return self._run(session, args, kwargs)
        args, kwargs = pytree.tree_map(_input, (args, kwargs))
        session = Session(self.selection)
        try:
            return session.run(lambda: self._run(session, args, kwargs))
        except RuntimeError as error:
            if autocast.active():
                raise UpcastError(
                    f"a model under policy {self.selection.policy} inside torch.autocast: both choose the dtypes of "
                    "operations, and torch cannot mix what they chose. Leave torch.autocast, or patch with "
                    f"policy='safe', which goes with it. ({error})"
                ) from error
            raise

    def _run(self, session: Session, args: Any, kwargs: Any) -> Any:
        _mark_own(self.module)
        session.frames.append(self.frame)
        try:
            inner = self.inner
            if inner is not None:
                return inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            session.frames.pop()


def check(root: nn.Module, policy: Policy) -> None:
    """Raise UpcastError if an override of ``policy`` names no module of ``root``."""
    names = [name for name, _ in named_modules(root)]
    for pattern, _ in policy.overrides:
        if not any(matches(name, pattern) for name in names):
            raise UpcastError(
                f"policy {str(policy)!r}: pattern {pattern!r} matches no module of {type(root).__name__}; an override "
                f"names a module, such as {names[-1]!r}. Correct the pattern."
            )


def install(root: nn.Module, selection: Selection) -> None:
    """Have every module of ``root`` run under the selection's policy."""
    for name, module in named_modules(root):
        _mark_own(module)
        forwards.push(module, Tracked(module, name, selection))


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    for module in modules(root):
        forwards.remove(module, Tracked.owner)
        for tensor in _own(module):
            mark(tensor, None)


def change(root: nn.Module, selection: Selection, policy: Policy) -> None:
    """Put a tracked model under another policy."""
    selection.policy = policy
    for module in modules(root):
        for each in forwards.stack(module):
            if isinstance(each, Tracked) and each.selection is selection:
                each.set_policy()


def _mark_own(module: nn.Module) -> None:
    """Mark a module's own float32 parameters and buffers: they may be new since the patch."""
    for tensor in _own(module):
        if mark_of(tensor) is None and tensor.dtype == torch.float32:
            mark(tensor, STORED)


def _own(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and type(tensor) is not HalfWeight:
                yield tensor


def _input(value: Any) -> Any:
    """A float32 input is as wide as the operation that uses it; the caller's tensor itself gets no mark."""
    if type(value) is not Tensor or mark_of(value) is not None:
        return value
    if value.dtype == torch.float32:
        return mark(value.view_as(value), STORED)
    return value.view_as(value) if value.dtype == torch.float16 else value

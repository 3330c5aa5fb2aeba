"""One stack of forwards per module: what a patched module carries in place of its class's own.

`push` puts a forward on top of the one that the instance has, `remove` takes an owner's out wherever it stands, and
leaves the others as they are: a fused forward, the tracking of a policy and a guard come and go in any order. A forward
that users put on a module stands in the stack where it was, and is run by what is above it.

A module holds its forward. If the forward held the module as well, a model that nobody needs any more would stay in
memory until the garbage collector runs, which it may not do for gigabytes: it counts objects, not their bytes.
"""

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, MethodType
from typing import Any, ClassVar

from torch import nn

from upcast.core import scopes
from upcast.core.errors import UpcastError


class _NoSourceError(UpcastError, AttributeError):
    """For who only looks whether there is source code, there is none."""


class Attached:
    """An object that ``module`` holds, and that knows it; it copies and pickles with the module."""

    owner: ClassVar[str] = "hooks"  # who put it there, and takes it away again
    weak: ClassVar[tuple[str, ...]] = ("_module",)  # attributes that are weak references to modules

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """The module that this belongs to."""
        module = self._alive()
        if module is None:
            raise UpcastError(
                f"a {type(self).__name__} whose module is gone; what a patched module has in place of a method does "
                "not keep the module in memory. Keep the module, and call it."
            )
        return module

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes with the modules themselves: a copy of a module puts itself in their place."""
        known = {name: getattr(self, name)() for name in self.weak}
        return {**self.__dict__, **known, "_module": self._alive()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = {name: _nothing if state[name] is None else weakref.ref(state[name]) for name in self.weak}
        self.__dict__.update(state | known)
        module = state["_module"]
        if module is not None and _holds(module, self):  # complete before us: we were copied alone, and only we have it
            self.__dict__["_kept"] = module

    def _alive(self) -> nn.Module | None:
        """Return the module, or one that holds this though it was made for another, which is gone; or None.

        A shallow copy of a module shares what its original holds, and may outlive it.
        """
        known = self._module()
        if known is not None:
            return known
        for holder in gc.get_referrers(self):
            for module in gc.get_referrers(holder) if isinstance(holder, dict) else [holder]:
                if isinstance(module, nn.Module) and _holds(module, self):
                    self._module = weakref.ref(module)
                    return module
        return None


class Forward(Attached):
    """An object called in place of a module's own ``forward``, or of another method."""

    method: ClassVar[str] = "forward"  # what of the class it stands for
    fast: ClassVar[bool] = False  # a short way for float32 models, which is left out where a policy decides dtypes
    looks_on: ClassVar[bool] = False  # it runs what is below it, and sees what comes out
    below: Any = None  # what the instance had in this one's place, of ours or of users; None: its class's method

    @property
    def __code__(self) -> CodeType:
        """Where torch.export says that the module's code begins."""
        return type(self).__call__.__code__

    @property
    def __globals__(self) -> Any:
        """What torch.jit.script asks for before it compiles; see `upcast.tensor.torchscript`."""
        raise _NoSourceError(
            "torch.jit.script of a part of a patched model; it compiles the code of layers for ordinary tensors, and "
            "weights stored in float16 are none. Call upcast.unpatch(model) first, or use torch.export."
        )


def push(module: nn.Module, forward: Forward) -> None:
    """Put ``forward`` on top of what ``module`` has."""
    forward.below = module.__dict__.get("forward")
    module.__dict__["forward"] = forward


def stack(module: nn.Module) -> Iterator[Any]:
    """Yield the forwards of this instance from the top down; the last may be one that users gave it."""
    forward = module.__dict__.get("forward")
    while forward is not None:
        yield forward
        forward = forward.below if isinstance(forward, Forward) else None


def in_effect(module: nn.Module) -> Any:
    """Return the forward that computes what this instance returns, or None: its class's."""
    return next((each for each in stack(module) if not getattr(each, "looks_on", False)), None)


_looking: Any = threading.local()  # .paused: blocks of `unobserved` in this thread


@contextmanager
def unobserved() -> Iterator[None]:
    """Within the block, no forward of this thread looks on."""
    with scopes.attribute(_looking, "paused", getattr(_looking, "paused", 0) + 1):
        yield


def observes() -> bool:
    """Whether forwards of this thread may look on."""
    return not getattr(_looking, "paused", 0)


def kept(module: nn.Module) -> Iterator[Forward]:
    """Yield our forwards of this instance by whatever name it holds them: accelerate renames one that it wraps."""
    for forward in list(module.__dict__.values()):
        while isinstance(forward, Forward):
            yield forward
            forward = forward.below  # noqa: PLW2901


def remove(module: nn.Module, *owners: str) -> None:
    """Take the forwards, and what else stands for a method, of ``owners`` away from ``module``; all others stay.

    One that a library keeps by a name of its own, to run it from a forward of its own, leaves there what it stands for.
    """
    state = module.__dict__
    for name, value in [item for item in state.items() if isinstance(item[1], Attached)]:
        if isinstance(value, Forward):
            left = _without(value, owners)
            if left is not None:
                state[name] = left
            elif hasattr(type(module), name):
                del state[name]
            else:
                state[name] = MethodType(getattr(type(module), value.method), module)
        elif value.owner in owners:
            del state[name]


def _without(top: Any, owners: Sequence[str]) -> Any:
    """Return what remains of the stack under ``top`` without the forwards of ``owners``, or None."""
    if not isinstance(top, Forward):
        return top
    below = _without(top.below, owners)
    if top.owner in owners:
        return below
    top.below = below
    return top


def _nothing() -> None:
    """What a reference to a module that is gone returns."""


def _holds(module: nn.Module, attached: Attached) -> bool:
    return any(value is attached for value in module.__dict__.values())

"""What a patched module carries as its ``forward``, and how it knows its module without keeping it alive.

A module holds its forward. If the forward held the module as well, a model that nobody needs any more would stay in
memory until the garbage collector runs, which it may not do for gigabytes: it counts objects, not their bytes.
"""

import gc
import weakref
from types import CodeType
from typing import Any, ClassVar

from torch import nn

from upcast.errors import UpcastError


class _NoSourceError(UpcastError, AttributeError):
    """For who only looks whether there is source code, there is none."""


class Attached:
    """An object that ``module`` holds, and that knows it; it copies and pickles with the module."""

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

    fast: ClassVar[bool] = False  # whether it is a short way for float32 models, and not what makes a policy or a watch

    @property
    def __code__(self) -> CodeType:
        """Where torch.export says that the module's code begins."""
        return type(self).__call__.__code__

    @property
    def __globals__(self) -> Any:
        """What torch.jit.script asks for before it compiles; see `upcast.scripted`."""
        raise _NoSourceError(
            "torch.jit.script of a part of a patched model; it compiles the code of layers for ordinary tensors, and "
            "weights stored in float16 are none. Call upcast.unpatch(model) first, or use torch.export."
        )


def give_back(module: nn.Module, forward: Any) -> None:
    """Give ``module`` the forward of its own that it had before, or none, in one step."""
    if forward is not None:
        module.__dict__["forward"] = forward
    else:
        del module.__dict__["forward"]


def _nothing() -> None:
    """What a reference to a module that is gone returns."""


def _holds(module: nn.Module, attached: Attached) -> bool:
    return any(value is attached for value in module.__dict__.values())

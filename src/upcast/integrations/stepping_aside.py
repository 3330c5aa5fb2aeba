"""Stepping aside: what upcast does by itself breaks no program.

A hook of ours that cannot serve a call, or fails in it, says so in one line and leaves the call to the library, as if
upcast were not there.
"""

import contextlib
import inspect
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
import wrapt
from torch import nn

from upcast.core import config, messages
from upcast.core.errors import UpcastError, describe
from upcast.core.module_tree import modules

Result = TypeVar("Result")


class NotOurs(Exception):
    """A call that upcast leaves to the library, and why; without a reason nothing is said."""


def attempt(
    what: str,
    ours: Callable[[], Result],
    theirs: Callable[[], Result],
    shared: Callable[[], bool] = lambda: False,
    verb: str = "runs",
) -> Result:
    """Return what ``ours`` gives; where it fails, what ``theirs`` gives, the library's own way.

    ``theirs`` draws the random numbers that ``ours`` has drawn. Where it fails too, its error is the program's own, and
    nothing is said. ``shared``: other processes do the same, so that this one cannot step aside alone.
    """
    drawn = _RandomState()
    try:
        with messages.held():
            return ours()
    except NotOurs as reason:
        _say_unpatched(f"{what} {verb}", str(reason))
        failure = ""
    except Exception as error:
        if shared():
            raise
        failure = describe(error)
    drawn.restore()  # outside the except block: what the error holds of the failed attempt is gone
    result = theirs()
    _say_unpatched(f"{what} {verb}", failure)
    return result


def _say_unpatched(what: str, why: str) -> None:
    if why:
        say(f"{what} as it is, unpatched: {why}")


def say(line: str) -> None:
    """Say one line, where it can be said: not into a closed stream, nor under variables that nobody understands."""
    with contextlib.suppress(Exception):
        messages.say(line, level=logging.WARNING)


def say_once(line: str) -> None:
    """Say a line that may come up again, for another part of the same model or in the next call."""
    if line not in _said:
        _said.add(line)
        say(line)


_said: set[str] = set()


def check_enabled() -> None:
    """Raise NotOurs where UPCAST has been switched off since the hooks were put in place."""
    if not config.read().enabled:
        raise NotOurs


def enabled() -> bool:
    """Return whether UPCAST is on, and its variables make sense."""
    try:
        return config.read().enabled
    except UpcastError:
        return False


class _RandomState:
    """What the generators of torch, Python and numpy will draw next."""

    def __init__(self) -> None:
        self._numpy: Any = sys.modules.get("numpy")
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numbers = self._numpy.random.get_state() if self._numpy is not None else None

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy.random.set_state(self._numbers)


@contextlib.contextmanager
def undone_if_it_fails(root: nn.Module) -> Iterator[None]:
    """Within the block ``root`` may be changed in every way; where it fails, all modules are what they were."""
    before = [(module.__dict__, dict(module.__dict__), _copies(module.__dict__)) for module in modules(root)]
    try:
        yield
    except BaseException:
        for state, attributes, copies in before:
            for name, copied in copies.items():  # in place: hooks know these very dictionaries
                attributes[name].clear()
                attributes[name].update(copied)
            for name in state.keys() - attributes.keys():  # a module is never without its attributes
                del state[name]
            state.update(attributes)
        raise


def _copies(state: dict[str, Any]) -> dict[str, Any]:
    """Return copies of a module's dictionaries and sets: of its tensors, its submodules and its hooks."""
    return {name: value.copy() for name, value in state.items() if isinstance(value, (dict, set))}


def wrap(module: ModuleType, wrappers: Mapping[str, Callable[..., Any]]) -> None:
    """Wrap the functions of these names in ``module``, all of them or, where one is missing, none."""
    found = [(*wrapt.resolve_path(module, name), wrapper) for name, wrapper in wrappers.items()]
    for parent, attribute, original, wrapper in found:
        if not _wrapped_with(inspect.getattr_static(parent, attribute), wrapper):  # as far as an interrupted call came
            wrapt.apply_patch(parent, attribute, wrapt.FunctionWrapper(original, wrapper))


def _wrapped_with(function: Any, wrapper: Callable[..., Any]) -> bool:
    return isinstance(function, wrapt.FunctionWrapper) and function._self_wrapper is wrapper

"""What holds for the time of a block or a call, and is put back at its end, wherever an interruption arrives in it.

``finally`` is not enough: what arrives where it begins leaves it out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")
_MISSING: Any = object()


def within(owner: Any, name: str, value: Any, function: Callable[[], Result]) -> Result:
    """Return what ``function`` gives while the attribute ``name`` of ``owner`` is ``value``."""
    before = getattr(owner, name, _MISSING)
    try:
        setattr(owner, name, value)
        result = function()
        _put_back(owner, name, before)
    except BaseException:
        _put_back(owner, name, before)
        raise
    return result


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block the attribute ``name`` of ``owner`` is ``value``.

    An interruption in what Python itself runs at the end of the block puts it back with the exception's last reference.
    """
    before = getattr(owner, name, _MISSING)
    try:
        setattr(owner, name, value)
        yield
        _put_back(owner, name, before)
    except BaseException:
        _put_back(owner, name, before)
        raise


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is not _MISSING:
        setattr(owner, name, before)
    elif hasattr(owner, name):
        delattr(owner, name)

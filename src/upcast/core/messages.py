"""What upcast says of itself, by the `logging` module: loggers ``upcast.*``, and one line on standard error.

A line that tells what was done is an INFO record of the logger of the module that did it, what a program runs without
a WARNING, the whole plan a DEBUG. The logger ``upcast`` has a handler that prints ``upcast: ...``, unless the program
has one of its own that prints to the terminal: then that one does, and no line appears twice. ``UPCAST_VERBOSE`` sets
the level. Of the processes that torchrun starts, rank 0 speaks. What a user should change is a warning, once.
"""

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from upcast.core import config, scopes

LEVELS = {0: logging.ERROR, 1: logging.INFO, 2: logging.DEBUG}  # UPCAST_VERBOSE -> level
_silent: Any = threading.local()  # .depth: blocks of `silent` in this thread; .held: what `held` holds back in it


class _Line(NamedTuple):
    logger: str
    level: int
    text: str
    detail: object


@contextmanager
def silent() -> Iterator[None]:
    """Within the block, this thread says nothing: what it patches are copies that nobody will see."""
    with scopes.attribute(_silent, "depth", getattr(_silent, "depth", 0) + 1):
        yield


@contextmanager
def held() -> Iterator[None]:
    """What this thread says within the block is heard when the block has ended well: of a failure nobody need know."""
    lines: list[_Line] = []
    with scopes.attribute(_silent, "held", lines):
        yield
    for line in lines:
        _say(line)


def say(line: str, detail: object = None, level: int = logging.INFO) -> None:
    """Log ``line`` for the calling module, and ``detail`` where the level is DEBUG (UPCAST_VERBOSE=2)."""
    _say(_Line(sys._getframe(1).f_globals.get("__name__", "upcast"), level, line, detail))


def warn(line: str) -> None:
    """Warn of what the user should change, once; where warnings are errors, log it: nothing of ours breaks a program.

    It is a UserWarning at the place where the program has called its library, or us.
    """
    if getattr(_silent, "depth", 0) or not _speaks():
        return
    try:
        warnings.warn(f"upcast: {line}", UserWarning, stacklevel=_outside())
    except UserWarning:
        _say(_Line("upcast", logging.WARNING, line, None))


def _outside() -> int:
    """Return the stack level of the caller outside upcast and the wrappers that it puts around libraries."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("upcast", "wrapt"):
        frame, level = frame.f_back, level + 1
    return level


def _say(line: _Line) -> None:
    if getattr(_silent, "depth", 0):
        return
    held_back: list[_Line] | None = getattr(_silent, "held", None)
    if held_back is not None:
        held_back.append(line)
        return
    _follow_the_environment()
    if _speaks():
        logger = logging.getLogger(line.logger)
        logger.log(line.level, "%s", line.text)
        if line.detail is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", line.detail)


def _speaks() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") in ("", "0") or os.environ.get("WORLD_SIZE", "1") in ("", "1")


class _StandardError(logging.Handler):
    """Prints lines as upcast has always printed them; detail as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(map(_prints, (*logging.root.handlers, *_root.handlers))):
            text = record.getMessage()
            write(text if record.levelno < logging.INFO else f"upcast: {text}")


def _prints(handler: logging.Handler) -> bool:
    """Whether a handler of the program's writes to the terminal."""
    stream = getattr(handler, "stream", None)
    return stream is not None and any(stream is each for each in (sys.stderr, sys.stdout, sys.__stderr__))


def write(text: str) -> None:
    """Write to standard error where there is one: what was done stands, whether somebody hears of it or not."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed one, or a full disk behind it
            print(text, file=sys.stderr)


def _follow_the_environment() -> None:
    """Set the level as UPCAST_VERBOSE says whenever that changes; in between, as the program has set it."""
    asked = config.read().verbose
    if _followed != [asked]:
        _followed[:] = [asked]
        _root.setLevel(LEVELS[asked])


_followed: list[int] = []
_root = logging.getLogger("upcast")
_root.addHandler(logging.NullHandler())
_root.addHandler(_StandardError())
_root.setLevel(logging.INFO)

"""What upcast says: aligned tables, byte counts, and its one line per patched model."""

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from upcast.core import config, scopes

_silent: Any = threading.local()  # .depth: blocks of `silent` in this thread; .held: what `held` holds back in it


@contextmanager
def silent() -> Iterator[None]:
    """Within the block, this thread says nothing: what it patches are copies that nobody will see."""
    with scopes.attribute(_silent, "depth", getattr(_silent, "depth", 0) + 1):
        yield


@contextmanager
def held() -> Iterator[None]:
    """What this thread says within the block is heard when the block has ended well: of a failure nobody need know."""
    lines: list[tuple[str, object]] = []
    with scopes.attribute(_silent, "held", lines):
        yield
    for line, detail in lines:
        say(line, detail)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return ``rows`` under ``headers`` in aligned columns; the columns in ``right`` are flush right."""
    widths = [max(len(line[i]) for line in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def megabytes(count: float) -> str:
    """Return a byte count in megabytes (10^6 bytes)."""
    return f"{count / 1e6:,.1f} MB"


def say(line: str, detail: object = None) -> None:
    """Print ``line`` to standard error, and ``detail`` when UPCAST_VERBOSE=2; nothing when it is 0."""
    if getattr(_silent, "depth", 0):
        return
    held_back: list[tuple[str, object]] | None = getattr(_silent, "held", None)
    if held_back is not None:
        held_back.append((line, detail))
        return
    verbose = config.read().verbose
    if verbose >= 1:
        _write(f"upcast: {line}")
    if verbose >= 2 and detail is not None:
        _write(str(detail))


def _write(text: str) -> None:
    """Write to standard error where there is one: what was done stands, whether somebody hears of it or not."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed one, or a full disk behind it
            print(text, file=sys.stderr)


def answer(text: object) -> int:
    """Print what a command was asked for to standard output; return the exit code, 1 where nobody takes it.

    A reader that has gone need not hear of it. What is yet to be written, to files or to the screen, is written.
    """
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = None  # or Python tries once more when it ends
        if not isinstance(error, BrokenPipeError):
            _write(f"upcast: standard output: {error}; what should stand there is lost. Send it elsewhere.")
        return 1
    return 0


class Progress:
    """How far ``total`` bytes of work have come: a bar on a terminal if tqdm is there, else a line per tenth."""

    def __init__(self, total: int) -> None:
        self.total, self.done = max(total, 1), 0
        self._what, self._bar = "", self._make_bar()

    def _make_bar(self) -> Any:
        try:
            if config.read().verbose == 0 or not sys.stderr.isatty():
                return None
        except (AttributeError, ValueError):  # there is none, or a closed one
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self.total, unit="B", unit_scale=True, leave=False)

    def phase(self, what: str) -> None:
        """Say what is being done from here on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def advance(self, count: int) -> None:
        """Note ``count`` more bytes as done."""
        before, self.done = 10 * self.done // self.total, self.done + count
        tenth = 10 * self.done // self.total
        if self._bar is not None:
            self._bar.update(count)
        elif tenth > before:
            say(f"{self._what}: {min(10 * tenth, 100)} % done")

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()

"""What commands print: aligned tables, byte counts, answers, and how far long work has come."""

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from upcast.core import config, messages


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


def listing(rows: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Return topics with what is found: side by side, or on a narrow terminal one under the other.

    Args:
        rows: (topic, finding).
        width: columns; None: the terminal's. Into a file or a pipe each row is one line, unless COLUMNS is set.
    """
    if width is None:
        known = "COLUMNS" in os.environ or (sys.stdout is not None and sys.stdout.isatty())
        width = shutil.get_terminal_size().columns if known else 0
    first = max(len(topic) for topic, _ in rows) + 2
    if not width:
        return "\n".join(f"{topic.ljust(first)}{finding}" for topic, finding in rows)
    stacked = width < 3 * first
    indent = "  " if stacked else " " * first
    lines: list[str] = []
    for topic, finding in rows:
        wrapped = textwrap.wrap(
            finding, max(width - len(indent), 16), break_on_hyphens=False, break_long_words=False
        ) or [""]
        lines += (
            [topic, *(indent + each for each in wrapped)]
            if stacked
            else [
                topic.ljust(first) + wrapped[0],
                *(indent + each for each in wrapped[1:]),
            ]
        )
    return "\n".join(lines)


def megabytes(count: float) -> str:
    """Return a byte count in megabytes (10^6 bytes)."""
    return f"{count / 1e6:,.1f} MB"


def answer(text: object) -> int:
    """Print what a command was asked for to standard output; return the exit code, 1 where nobody takes it.

    A reader that has gone need not hear of it. What is yet to be written, to files or to the screen, is written.
    """
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        sys.stdout = None  # or Python tries once more when it ends
        if not isinstance(error, BrokenPipeError):
            messages.write(f"upcast: standard output: {error}; what should stand there is lost. Send it elsewhere.")
        return 1
    return 0


class Progress:
    """How far long work has come and how long it will take, on a terminal, once it has taken two seconds.

    A bar where tqdm is there, else a line per tenth; nothing where standard error is a file or a pipe.
    """

    def __init__(self, total: int, what: str = "", unit: str = "B") -> None:
        self.total, self.done = max(total, 1), 0
        self._what, self._start, self.shown = what, time.monotonic(), _on_a_terminal()
        self._bar = self._make_bar(unit) if self.shown else None

    def _make_bar(self, unit: str) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        scaled = unit == "B"
        return tqdm(total=self.total, unit=unit, unit_scale=scaled, desc=self._what, leave=False, delay=_PATIENCE)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def phase(self, what: str) -> None:
        """Say what is being done from here on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description(what)

    def advance(self, count: int = 1) -> None:
        """Note that ``count`` more of the total is done."""
        before, self.done = 10 * self.done // self.total, self.done + count
        tenth = 10 * self.done // self.total
        if self._bar is not None:
            self._bar.update(count)
        elif self.shown and tenth > before and time.monotonic() - self._start > _PATIENCE:
            left = (time.monotonic() - self._start) * (self.total - self.done) / self.done
            messages.write(f"upcast: {self._what}: {min(10 * tenth, 100)} % done, {max(left, 0):.0f} s left")

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()


_PATIENCE = 2  # seconds


def _on_a_terminal() -> bool:
    try:
        return config.read().verbose > 0 and sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no standard error, or a closed one
        return False

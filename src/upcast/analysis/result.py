"""The shape of what every measurement gives: printed a table, and as Markdown, JSON and a picture."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from upcast.core import console


class Table(NamedTuple):
    """Cells of text; the columns in ``right`` are flush right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[int] = ()


class Result(ABC):
    """What `upcast.diagnose`, `upcast.search`, `upcast.ablate` and `upcast.certify` return. Printing it gives a table.

    >>> found = upcast.diagnose(model, inputs)
    >>> print(found)
    >>> found.to_json("headroom.json")
    >>> found.plot("headroom.png")
    """

    def __str__(self) -> str:
        text = (self._title(), console.table(*self._table()), self._end())
        return "\n".join(part for part in text if part)

    def to_markdown(self) -> str:
        """Return title and table in Markdown."""
        headers, rows, right = self._table()
        rule = ["---:" if column in right else "---" for column in range(len(headers))]
        lines = [" | ".join(cells) for cells in (headers, rule, *rows)]
        return "\n\n".join([f"**{self._title()}**", "\n".join(f"| {line} |" for line in lines)])

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything as JSON text, and write it to ``path`` if given; null for what is not finite."""
        text = json.dumps(_finite(self._content()), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def plot(self, path: str | Path) -> Path:
        """Write a picture, a PNG, to ``path``, and return it.

        Raises:
            UpcastError: matplotlib is not installed (pip install 'torch-upcast[plot]').
        """
        self._draw(Path(path))
        return Path(path)

    @abstractmethod
    def _title(self) -> str: ...

    @abstractmethod
    def _table(self) -> Table: ...

    def _end(self) -> str:
        """Return what is said below the table."""
        return ""

    @abstractmethod
    def _content(self) -> dict[str, Any]: ...

    @abstractmethod
    def _draw(self, path: Path) -> None: ...


def _finite(value: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value

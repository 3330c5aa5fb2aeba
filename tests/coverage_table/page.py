"""docs/coverage.md, written from measured rows."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.coverage_table.case import Missing
from tests.coverage_table.exceptions import CAUSES
from tests.coverage_table.measure import CACHED_ERROR, FORWARD_ERROR, LARGEST_COPY, Row

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
LIBRARIES = ("torch", "litgpt", "transformers", "diffusers")

HEAD = """# Coverage

Written by `make coverage-table`; do not edit. {versions}.

Every architecture below is a tiny random instance: same structure, few layers and channels. It is patched, and its
outputs are compared with float32 on the same weights, rounded to float16. A row is green if the forward pass differs
by at most {forward:.0e}, generation with its cache by at most {cached:.0e} (a float16 cache rounds), and no operation
makes a float32 copy of a weight larger than {copy} MB **at the published size** of the model.

**{green} green, {exceptions} exceptions with a cause, {missing} not built**, in {minutes:.1f} minutes.

- *forward, generate*: relative error of all outputs, and of the logits of greedy generation.
- *MB*: bytes of the tiny instance's tensors, before and after.
- *fused*: the forwards that the native kernels replace whole.
- *copies*: float32 copies of whole weights that were counted, the largest at the published size where it is known.
"""


def write(rows: Sequence[Row | Missing]) -> str:
    """Write the page; return its line of counts."""
    measured = [row for row in rows if isinstance(row, Row)]
    absent = [row for row in rows if isinstance(row, Missing)]
    green = sum(not row.wrong for row in measured)
    text = HEAD.format(
        versions=", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        forward=FORWARD_ERROR,
        cached=CACHED_ERROR,
        copy=LARGEST_COPY >> 20,
        green=green,
        exceptions=len(measured) - green,
        missing=len(absent),
        minutes=sum(row.seconds for row in measured) / 60,
    )
    text += _exceptions(measured, absent)
    for group in dict.fromkeys(row.case.group for row in measured):
        text += _group(group, [row for row in measured if row.case.group == group])
    PAGE.write_text(text)
    return f"{green} green, {len(measured) - green} exceptions, {len(absent)} not built"


def _exceptions(measured: Sequence[Row], absent: Sequence[Missing]) -> str:
    lines = [
        f"- {row.case.group}, {row.case.name}: {CAUSES.get(row.case.name, row.wrong)}" for row in measured if row.wrong
    ]
    lines += [f"- {row.group}, {row.name}: {row.cause}" for row in absent]
    return "\n## Exceptions\n\n" + "\n".join(lines or ["None."]) + "\n"


def _group(group: str, rows: Sequence[Row]) -> str:
    cells = "| architecture | forward | generate | MB | fused | copies | |\n|---|---:|---:|---:|---|---|---|\n"
    return f"\n## {group}\n\n{cells}" + "".join(map(_line, rows))


def _line(row: Row) -> str:
    fused = ", ".join(kind.removeprefix("Fused") for kind in row.fused)
    note = f" ({row.case.note})" if row.case.note else ""
    generated = "" if row.generated is None else f"{row.generated:.0e}"
    sizes = f"{row.before / 1e6:.2f} → {row.after / 1e6:.2f}"
    state = "exception" if row.wrong else "green"
    return (
        f"| {row.case.name}{note} | {row.forward:.0e} | {generated} | {sizes} | {fused} | {_copies(row)} | {state} |\n"
    )


def _copies(row: Row) -> str:
    operations = sorted({name.split(" of ")[0] for name in row.upcast})
    return f"{', '.join(operations)}: {max(row.upcast.values()) / 1e6:.2f} MB" if operations else ""


def names() -> list[str]:
    """Return the first cell of every line of the page's tables, without notes, in order."""
    lines = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| architecture |")
    ]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines]


def versions() -> str:
    """Return the line of the page that says what it was measured with."""
    return PAGE.read_text().splitlines()[2]

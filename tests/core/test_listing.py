"""Topics and findings: side by side where there is room, and a line each where a program reads them."""

import pytest

from upcast.core import console

ROWS = [("kernels", "native, of the processor that this is"), ("a long topic", "")]
# COLUMNS, or None where it is not set -> what a pipe gets
PIPED: list[tuple[str | None, list[str]]] = [
    (None, ["kernels       native, of the processor that this is", "a long topic  "]),
    ("200", ["kernels       native, of the processor that this is", "a long topic"]),
    ("44", ["kernels       native, of the processor that", "              this is", "a long topic"]),
    ("24", ["kernels", "  native, of the", "  processor that this is", "a long topic"]),
]


@pytest.mark.parametrize(("columns", "want"), PIPED)
def test_a_pipe_gets_what_columns_says(
    columns: str | None, want: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    found = console.listing(ROWS).splitlines()
    assert [line.rstrip() for line in found if line.strip()] == [line.rstrip() for line in want]

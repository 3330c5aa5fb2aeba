"""The benchmark writes its tables into the README and into docs/performance.md, and both say the same."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import readme, roofline
from tests.docs.pages import ROOT

TIMINGS = {"prefill_seconds": {"median": 0.5}, "decode_seconds": {"median": 0.02}}
QUALITY = {"relative_error": 9e-7, "top1_agreement": 1.0}
RATIOS = {"prefill_seconds": 0.5, "decode_seconds": 0.25}
BYTES = {"weight_bytes": 269e6, "peak_loading_bytes": 285e6, "bytes_per_token": 269e6, "prompt_operations": 20e9}
SHARES = "upcast 40 %; float16 40 %"  # of the multiply-adds below, in half a second
# what is measured -> its cells
VARIANTS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"variant": "upcast", "timings": TIMINGS, "quality": QUALITY, "stress": [{"scale": 4, "nonfinite_share": 0.0}]},
        ["**upcast**", "269 MB", "285 MB", "200 tok/s (2.00x)", "20.0 ms (4.00x)", "9e-07", "100.0%", "none"],
    ),
    (
        {"variant": "float16", "timings": TIMINGS, "quality": None, "stress": [{"scale": 4, "nonfinite_share": 1.0}]},
        ["float16", "269 MB", "285 MB", "200 tok/s (2.00x)", "20.0 ms (4.00x)", "NaN", "-", "at scale 4"],
    ),
]
RECORD = {
    "machine": {"cpu": "a processor"},
    "subject": {"model": "a model", "prompt_tokens": 100},
    "threads": 2,
    "read_rates": [20e9, 20.1e9, 20.2e9],
    "multiply_rates": [99e9, 100e9, 101e9],
    "versions": {"torch": "2.13.0"},
    "date": "2026-11-28T08:00:00",
    "variants": [{**BYTES, "ratios": RATIOS, **variant} for variant, _ in VARIANTS],
}


def table(path: Path) -> list[list[str]]:
    """Return the cells of the table between the marks, without its second line."""
    section = path.read_text("utf-8").partition(readme.BEGIN)[2].partition(readme.END)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (rows[0], *rows[2:])]


def test_a_run_is_written_into_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    for page in readme.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text("utf-8"))
    record = tmp_path / "run.json"
    record.write_text(json.dumps(RECORD))
    record.with_suffix(".png").write_bytes(b"a picture")
    roofline.beside(record).write_bytes(b"another")
    monkeypatch.setattr(sys, "argv", ["readme.py", str(record)])
    assert readme.main() == 0
    assert (tmp_path / readme.PICTURE).read_bytes() == b"a picture"
    assert (tmp_path / readme.ROOFLINE).read_bytes() == b"another"
    manual = (tmp_path / readme.MANUAL).read_text("utf-8")
    assert "upcast 20.0 of at least 13.4; float16" in manual
    assert f"products use: {SHARES}." in manual
    for page, columns in readme.PAGES.items():
        assert table(tmp_path / page)[1:] == [[cells[column] for column in columns] for _, cells in VARIANTS]
        before, after = (ROOT / page).read_text("utf-8"), (tmp_path / page).read_text("utf-8")
        assert before.partition(readme.BEGIN)[0] == after.partition(readme.BEGIN)[0]
        before, after = (text.partition(readme.END)[2] for text in (before, after))
        assert before.partition(readme.BEGIN_ROOFLINE)[0] == after.partition(readme.BEGIN_ROOFLINE)[0]
        assert before.partition(readme.END_ROOFLINE)[2] == after.partition(readme.END_ROOFLINE)[2]


def test_both_pages_say_the_same() -> None:
    everything = table(ROOT / "docs" / "performance.md")
    assert len(everything) > 5
    assert table(ROOT / "README.md") == [[row[column] for column in readme.SHORT] for row in everything]

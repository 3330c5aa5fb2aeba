"""Every tutorial runs as it stands, without a network, and shows what it gives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import DOCS, ROOT
from tests.docs.test_pages import ALT, PRIVATE

for library in ("nbclient", "ipykernel", "transformers", "peft", "litgpt", "matplotlib"):
    pytest.importorskip(library)

NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
EXPECTED = {"nan", "memory", "lora", "selective", "serve", "processes"}
PROMISES = {  # notebook -> what it must print, wherever it runs
    "nan": ["float16: tensor([nan, nan, nan]", "finite: True"],
    "memory": ["the same tokens: True"],
    "lora": ["largest distance from float32's loss"],
    "selective": ["bit for bit the same in float32: True", "finite in float16: False", "finite: True"],
    "serve": ["the same as alone: True"],
    "processes": ["rank 0 has", "rank 1 has"],
}
BOUNDS = {  # notebook -> what stands before a number that it prints, and the largest that it may be
    "nan": ("distance from float32: ", 2e-3),  # its weights are rounded
    "memory": ("logits differ by ", 1e-5),
    "lora": ("float32's loss: ", 1e-4),
    "processes": ("distance: ", 1e-5),
}


def test_all_are_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == EXPECTED == {*PROMISES}


QUICK = {"nan"}
RUNS = [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_its_outputs_are_kept(path: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "notebooks.py"), path.stem, "--output", str(tmp_path)]
    ran = subprocess.run(tool, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    kept, now = (json.loads(file.read_text("utf-8"))["cells"] for file in (path, tmp_path / path.name))
    assert [_kinds(cell) for cell in now] == [_kinds(cell) for cell in kept], "run tools/notebooks.py"
    assert [cell["id"] for cell in now] == [cell["id"] for cell in kept]  # written by that tool, and by nothing else
    for printed in (_printed(now), _printed(kept)):
        assert [promise for promise in PROMISES[path.stem] if promise not in printed] == []
        assert str(ROOT) not in printed
        before, largest = BOUNDS.get(path.stem, ("", 0.0))
        assert not before or float(printed.partition(before)[2].split()[0]) <= largest


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_is_for_its_readers(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert "".join(cells[0]["source"]).startswith("# ")
    assert [match[0] for cell in cells for match in PRIVATE.finditer("".join(cell["source"]))] == []
    for cell in cells:
        pictures = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        assert len(cell["metadata"].get("alt", "")) >= ALT or not pictures


def _kinds(cell: Any) -> list[tuple[str, str, tuple[str, ...]]]:
    outputs = cell.get("outputs", [])
    return [(o["output_type"], o.get("name", ""), tuple(sorted(o.get("data", {})))) for o in outputs]


def _printed(cells: Any) -> str:
    return "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))

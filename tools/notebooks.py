"""Run the tutorials and keep what they print: each notebook in an empty folder, on one thread, without timings.

python tools/notebooks.py              # all of them
python tools/notebooks.py nan lora     # some
python tools/notebooks.py --output DIR # leaves them as they are, and writes into DIR
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
LONGEST = 120  # seconds for one cell
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


def main() -> int:
    """Run the notebooks that are named, or all, and write them with their outputs."""
    parser = argparse.ArgumentParser(description="Run the tutorials and keep what they print.")
    parser.add_argument("names", nargs="*", help="such as nan; without any: all")
    parser.add_argument("--output", type=Path, metavar="DIR", default=FOLDER, help="write there (default: in place)")
    options = parser.parse_args()
    for path in [FOLDER / f"{name}.ipynb" for name in options.names] or sorted(FOLDER.glob("*.ipynb")):
        (options.output / path.name).write_text(nbformat.writes(run(path)) + "\n", "utf-8")
        print(f"ran {path.name}")
    return 0


def run(path: Path) -> Any:
    """Return the notebook with what its cells print now; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="upcast-tutorial-") as folder:
        manager = KernelManager(transport="ipc", ip=f"{folder}/kernel")  # files, not ports: others cannot reach it
        settings = {"timeout": LONGEST, "record_timing": False, "resources": {"metadata": {"path": folder}}}
        client = NotebookClient(notebook, km=manager, **settings)
        kernel = {name: value for name, value in os.environ.items() if not name.startswith("UPCAST")}
        try:
            client.execute(env={**kernel, **ENVIRONMENT})
        finally:
            manager.shutdown_kernel(now=True)
    return tidy(notebook)


def tidy(notebook: Any) -> Any:
    """Return the notebook without what differs from run to run or from machine to machine, and others' warnings."""
    notebook.metadata = {"language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Return what upcast said, then what was printed, then the rest: as one text each, whatever came in between."""
    streams = {name: "".join(o.text for o in outputs if o.get("name") == name) for name in ("stderr", "stdout")}
    lines = streams["stderr"].splitlines(keepends=True)
    streams["stderr"] = "".join(line for line in lines if line.startswith("upcast:"))
    kept = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in streams.items() if text]
    return [*kept, *(output for output in outputs if output.output_type != "stream")]


if __name__ == "__main__":
    sys.exit(main())

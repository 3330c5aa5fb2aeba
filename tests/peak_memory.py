"""Peak memory of what a test does with each of several folders, above what the process holds before it."""

from collections.abc import Iterable
from pathlib import Path

from tests.conftest import Run

ROOT = Path(__file__).parents[1]

MEASURE = """
import os, sys
from pathlib import Path
from benchmarks.harness import memory
{imports}
for folder in map(Path, sys.argv[1:]):
    if os.fork():  # a process for each folder, of which none imports the libraries again
        os.wait()
        continue
    memory.reset_peak()
    before = memory.peak_bytes()
    {action}
    print(memory.peak_bytes() - before, flush=True)
    os._exit(0)
"""


def peaks(python: Run, imports: str, action: str, folders: Iterable[Path], **variables: str) -> list[int]:
    """Return how many bytes ``action``, a line of Python, takes at most for each ``folder``."""
    names = [*map(str, folders)]
    script = MEASURE.format(imports=imports, action=action)
    result = python("-c", script, *names, PYTHONPATH=str(ROOT), **variables)
    found = [*map(int, result.stdout.split())]
    assert len(found) == len(names), result.stderr
    return found

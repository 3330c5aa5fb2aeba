"""``python -m tests.coverage_table [NAME ...]``: measure everything, or some rows again, and write docs/coverage.md.

What was measured is kept in build/coverage.pickle, so that after a change to a few rows (named by their first word), or
after an interruption (``--continue``), the others need not be measured again.
"""

import os
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.coverage_table import everything, page
from tests.coverage_table.case import Missing
from tests.coverage_table.exceptions import CAUSES
from tests.coverage_table.measure import Row, measure

KEPT = Path(__file__).parents[2] / "build" / "coverage.pickle"


def main(again: list[str]) -> int:
    """Print one line per row; return 1 if a row is neither green nor a known exception."""
    os.environ["UPCAST_VERBOSE"] = "0"
    torch.set_num_threads(1)  # models as tiny as these would mostly wait for the second
    warnings.simplefilter("ignore")
    kept: dict[tuple[str, str], Any] = pickle.loads(KEPT.read_bytes()) if again else {}
    rows: list[Row | Missing] = []
    surprises = []
    for case in everything():
        if isinstance(case, Missing):
            rows.append(case)
            print(f"- {case.group}, {case.name}", flush=True)
            continue
        key = case.group, case.name
        fresh = key not in kept or case.name.split()[0] in again
        row = measure(case) if fresh else replace(kept[key], case=case)
        rows.append(row)
        kept[key] = replace(row, case=None)  # type: ignore[arg-type]  # a case is made of functions
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_bytes(pickle.dumps(kept))
        if row.wrong and case.name not in CAUSES:
            surprises.append(f"{case.group}, {case.name}: {row.wrong}")
        if fresh:
            print(f"{'x' if row.wrong else '.'} {case.group}, {case.name}: {row.seconds:.1f} s {row.wrong}", flush=True)
    print(f"{page.write(rows)}; {page.PAGE.name} written")
    print("\n".join(surprises), file=sys.stderr)
    return 1 if surprises else 0


sys.exit(main(sys.argv[1:]))

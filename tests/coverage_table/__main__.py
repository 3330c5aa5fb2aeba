"""``python -m tests.coverage_table``: measure everything and write docs/coverage.md."""

import os
import sys
import time
import warnings

import torch

from tests.coverage_table import everything, page
from tests.coverage_table.case import Missing
from tests.coverage_table.exceptions import CAUSES
from tests.coverage_table.measure import Row, measure


def main() -> int:
    """Print one line per row; return 1 if a row is neither green nor a known exception."""
    os.environ["UPCAST_VERBOSE"] = "0"
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows: list[Row | Missing] = []
    surprises = []
    for case in everything():
        row = case if isinstance(case, Missing) else measure(case)
        rows.append(row)
        wrong = "" if isinstance(row, Missing) else row.wrong
        if wrong and case.name not in CAUSES:
            surprises.append(f"{case.group}, {case.name}: {wrong}")
        print(f"{'-' if isinstance(row, Missing) else 'x' if wrong else '.'} {case.group}, {case.name}", flush=True)
    print(f"{page.write(rows, time.perf_counter() - start)}; {page.PAGE.name} written")
    print("\n".join(surprises), file=sys.stderr)
    return 1 if surprises else 0


sys.exit(main())

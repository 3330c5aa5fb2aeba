"""The coverage table: a tiny random instance of every architecture, patched, against float32 on the same weights.

`cases` says what there is, `measure` measures one row, `page` writes docs/coverage.md. ``make coverage-table`` runs
everything; tests/test_coverage_table.py runs a part of it that is chosen in `cases`.
"""

from collections.abc import Iterator

from tests.coverage_table.case import Case, Missing


def everything() -> Iterator[Case | Missing]:
    """Yield every case there is, group by group."""
    from tests.coverage_table import diffusion, families, litgpt_models, plain, seeing, story, text

    for module in (story, litgpt_models, text, families, seeing, diffusion, plain):
        yield from module.cases()

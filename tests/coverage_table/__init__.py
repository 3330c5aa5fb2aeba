"""The coverage table: a tiny random instance of every architecture, patched, against float32 on the same weights.

`cases` says what there is, `measure` measures one row, `page` writes docs/coverage.md. ``make coverage-table`` runs
everything; tests/test_coverage_table.py runs a part of it that is chosen in `cases`.
"""

"""Patterns of names: those of file names, ranges of numbers, and the modules that hold what is named."""

import fnmatch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcast import UpcastError
from upcast.core.pattern import LONGEST, matches

# pattern, names that it matches, names that it does not
RANGES = [
    ("h.11..28", ["h.11", "h.12.mlp", "h.28", "h.011"], ["h.10", "h.29", "h.1", "h.111", "h.12x", "x.h.12"]),
    ("*11..28", ["h.11", "layer28", "12"], ["h.1", "h.111", "h.11x"]),
    ("h.1*2..3", ["h.1.2", "h.1x3", "h.10.2"], ["h.12", "h.112", "h.1.4"]),
    ("h.1..3?", ["h.1x", "h.3."], ["h.12", "h.33"]),
    ("*.2..3.4..5", ["a.2.4", "a.b.3.5.c"], ["a.2.3", "a.4.4"]),
    ("h.1..2..3", ["h.2..3"], ["h.2", "h.1.3"]),
    ("h.28..11", [], ["h.11", "h.20"]),
    ("h.0..99999999999999999999999", ["h.99999999999999999999999", "h.7"], ["h.100000000000000000000000"]),
    ("?1..9", ["a5", "-7"], ["15", "5", "a10"]),
    ("[ab].*2..2", ["a.x.2", "b.2"], ["c.2", "a.12"]),
]
LETTERS = st.text("aab.[]!-^*?12é\n", max_size=9)


@pytest.mark.parametrize(("pattern", "yes", "no"), RANGES)
def test_ranges_of_whole_numbers(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [name for name in (*yes, *no) if matches(name, pattern)] == yes


@settings(max_examples=2000)
@given(LETTERS, LETTERS)
def test_as_file_names_for_the_rest(name: str, pattern: str) -> None:
    if ".." in pattern:
        return
    parts = name.split(".")
    holders = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    assert matches(name, pattern) == any(fnmatch.fnmatchcase(each, pattern) for each in holders)


def test_a_pattern_longer_than_any_name_is_refused() -> None:
    assert matches("a" * LONGEST, "a" * LONGEST)
    with pytest.raises(UpcastError, match=r"a pattern of 1,001 characters \('aaa.*at most 1,000"):
        matches("a", "a" * (LONGEST + 1))

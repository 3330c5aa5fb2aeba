"""Patterns of tensor and module names, in policies, ``keep``, ``trainable`` and the environment.

``*`` and ``?`` stand for any text and any letter, ``[ab]``, ``[a-c]`` and ``[!a]`` for one of several letters, as in
file names; ``11..28`` for a whole number in that range. Patterns and names come from files: a name is read once, letter
by letter, with every place that it may have reached in the pattern as a bit of one number. Nothing is tried twice.
"""

import re
from functools import lru_cache

from upcast.core.errors import UpcastError

LONGEST = 1000
# a range (from its first digit: else its digits are read again from each), one of several letters, or any letter
_TOKEN = re.compile(r"(?<![0-9])([0-9]+)\.\.([0-9]+)|\[((?:!|(?!!)).[^]]*)\]|(\*+)|(.)", re.DOTALL)
_NUMBER = re.compile("[0-9]+")


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names this tensor or module, or a module that holds it.

    Raises:
        UpcastError: the pattern is longer than any name.
    """
    return compiled(pattern).matches(name)


class Pattern:
    """A pattern as sets of places in it, each set a number with a bit per place."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise UpcastError(
                f"a pattern of {len(pattern):,} characters ({pattern[:40]!r}...); it has at most {LONGEST:,}. "
                "Shorten it."
            )
        self._stars, self._taking = 0, _Taking()
        self._ranges: list[tuple[int, tuple[int, str], tuple[int, str]]] = []
        place = 1
        for low, high, letters, star, letter in _TOKEN.findall(pattern):
            if low:
                self._ranges.append((place, _order(low), _order(high)))
            elif star:
                self._stars |= place
            else:
                self._taking.add(place, letters, letter)
            place <<= 1
        self._end = place

    def matches(self, name: str) -> bool:
        """Whether this names ``name``, or what comes before one of its dots."""
        stars, end, taking = self._stars, self._end, self._taking
        places, after, last_digit = 1 | (stars & 1) << 1, 0, -1
        for at, letter in enumerate(name):
            if letter == "." and places & end:
                return True
            if self._ranges and at > last_digit and (number := _NUMBER.match(name, at)):
                after, last_digit = self._past_number(places, number.group()), number.end() - 1
            places = (places & taking[letter]) << 1 | places & stars
            if at == last_digit:
                places |= after
            places |= (places & stars) << 1
            if not places and at >= last_digit:
                return False
        return bool(places & end)

    def _past_number(self, places: int, number: str) -> int:
        value, after = _order(number), 0
        for place, low, high in self._ranges:
            if places & place and low <= value <= high:
                after |= place << 1
        return after


class _Taking(dict[str, int]):
    """Letter -> the places that take it, found when it is asked for."""

    def __init__(self) -> None:
        self._any = 0
        self._letters: dict[str, int] = {}
        self._sets: list[tuple[int, bool, list[tuple[str, str]]]] = []  # place, whether it takes the others, letters

    def add(self, place: int, letters: str, letter: str) -> None:
        """Note that a place takes one of several ``letters``, or this ``letter``, or any."""
        if letters:
            others = letters[0] == "!"
            spans = re.findall(r"(.)(?:-(.))?", letters[others:], re.DOTALL)
            self._sets.append((place, others, [(low, high or low) for low, high in spans]))
        elif letter == "?":
            self._any |= place
        else:
            self._letters[letter] = self._letters.get(letter, 0) | place

    def __missing__(self, letter: str) -> int:
        found = self._any | self._letters.get(letter, 0)
        for place, others, spans in self._sets:
            if any(low <= letter <= high for low, high in spans) != others:
                found |= place
        if letter.isascii():  # or a name with every letter that there is would be remembered
            self[letter] = found
        return found


compiled = lru_cache(maxsize=256)(Pattern)


def _order(digits: str) -> tuple[int, str]:
    """Return what compares as the number does, of however many digits."""
    digits = digits.lstrip("0")
    return len(digits), digits

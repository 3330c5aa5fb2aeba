"""The smallest set of op classes that is enough: for `upcast.search`, and for healing."""

from collections.abc import Callable, Iterable

from upcast.policy.policy import show


def smallest(
    order: Iterable[str], start: Iterable[str], enough: Callable[[frozenset[str], str], bool]
) -> frozenset[str] | None:
    """Return a set of classes that is enough and of which none can be dropped; None if all of them are not enough.

    Classes are added until they are enough, and then dropped one by one as long as the rest still is (delta debugging
    with single steps). One that cannot be dropped from a larger set cannot be from a smaller.

    Args:
        order: the classes, the likeliest first.
        start: those to begin with.
        enough: called with a set, and with what is tried in words. The empty set is taken for not enough.
    """
    order, chosen = list(order), frozenset(start)
    while not enough(chosen, f"upcast {show(chosen)}"):
        rest = [each for each in order if each not in chosen]
        if not rest:
            return None
        chosen |= {rest[0]}
    for each in reversed([each for each in order if each in chosen]):
        if len(chosen) > 1 and enough(chosen - {each}, f"drop {each}"):
            chosen -= {each}
    return chosen

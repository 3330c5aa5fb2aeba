"""The question that a fused model asks before each token: is everything that it kept still what the model has?"""

from collections.abc import Callable
from typing import Any

import pytest

from upcast.kernels import native

State = tuple[list[dict[str, Any]], list[dict[str, Any]]]

CHANGES: dict[str, Callable[[list[dict[str, Any]], list[dict[str, Any]]], Any]] = {
    "replaced": lambda dicts, owners: dicts[0].update(a=object()),
    "replaced by its equal": lambda dicts, owners: dicts[0].update(a=[1]),
    "added": lambda dicts, owners: dicts[1].update(d=object()),
    "removed": lambda dicts, owners: dicts[0].pop("b"),
    "last one removed": lambda dicts, owners: owners.pop(),
    "one more": lambda dicts, owners: dicts.append({"e": object()}),
    "forward replaced": lambda dicts, owners: owners[0].update(forward=object()),
    "forward removed": lambda dicts, owners: owners[0].pop("forward"),
    "forward added": lambda dicts, owners: owners[1].update(forward=object()),
}


def state() -> State:
    return [{"a": [1], "b": object()}, {}, {"c": None}], [{"forward": object()}, {"other": 1}]


def kept(dicts: list[dict[str, Any]], owners: list[dict[str, Any]]) -> list[Any]:
    return [*(value for each in dicts for value in each.values()), *(owner.get("forward") for owner in owners)]


def test_the_same_objects_are_unchanged() -> None:
    dicts, owners = state()
    assert native.unchanged(kept(dicts, owners), dicts, owners, ["forward"] * 2)


def test_nothing_is_unchanged() -> None:
    assert native.unchanged([], [], [], [])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    dicts, owners = state()
    before = kept(dicts, owners)
    CHANGES[name](dicts, owners)
    assert not native.unchanged(before, dicts, owners, ["forward"] * 2)


def test_more_than_there_is_was_kept() -> None:
    dicts, owners = state()
    assert not native.unchanged([*kept(dicts, owners), None], dicts, owners, ["forward"] * 2)


@pytest.mark.parametrize("position", range(4))
def test_what_is_no_list_is_refused(position: int) -> None:
    arguments: list[Any] = [[], [], [], []]
    arguments[position] = ()
    with pytest.raises(TypeError, match="lists"):
        native.unchanged(*arguments)


def test_fewer_names_than_owners_are_refused() -> None:
    with pytest.raises(IndexError):
        native.unchanged([None], [], [{}], [])

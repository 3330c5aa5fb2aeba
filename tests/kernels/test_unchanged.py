"""The question that a fused model asks before each token: is everything that it kept still what the model has?"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

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


class Holder:
    """Its __dict__ shares its keys with other instances'."""

    def __init__(self) -> None:
        self.a, self.b, self.forward = 1, 2, object()


def state() -> State:
    return [{"a": [1], "b": object()}, {}, {"c": None}], [{"forward": object()}, {"other": 1}]


def kept(dicts: list[dict[str, Any]], owners: list[dict[str, Any]]) -> list[Any]:
    return [*(value for each in dicts for value in each.values()), *(owner.get("forward") for owner in owners)]


@pytest.fixture(params=["native", "portable"])
def _each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is asked where there is no native library."""
    for name in ("unchanged", "all_empty"):
        monkeypatch.setattr(native, name, getattr(native, f"_{name}" if request.param == "portable" else name))


@pytest.mark.usefixtures("_each")
def test_the_same_objects_are_unchanged() -> None:
    dicts, owners = state()
    assert native.unchanged(kept(dicts, owners), dicts, owners, ["forward"] * 2)


@pytest.mark.usefixtures("_each")
def test_nothing_is_unchanged() -> None:
    assert native.unchanged([], [], [], [])


@pytest.mark.usefixtures("_each")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    dicts, owners = state()
    before = kept(dicts, owners)
    CHANGES[name](dicts, owners)
    assert not native.unchanged(before, dicts, owners, ["forward"] * 2)


@pytest.mark.usefixtures("_each")
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


@pytest.mark.usefixtures("_each")
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 100])
def test_the_last_of_many_is_seen(count: int) -> None:
    """Dictionaries are fetched ahead of their turn: small and large ones, with and without shared keys."""
    dicts = [{str(j): object() for j in range(i % 40)} for i in range(count)]
    owners = [vars(Holder()) for _ in range(count)]
    names = ["forward"] * count
    before = kept(dicts, owners)
    assert native.unchanged(before, dicts, owners, names)
    owners[-1]["forward"] = object()
    assert not native.unchanged(before, dicts, owners, names)
    before = kept(dicts, owners)
    dicts[-1]["new"] = None
    assert not native.unchanged(before, dicts, owners, names)


@pytest.mark.usefixtures("_each")
@pytest.mark.parametrize("count", [0, 1, 7, 16, 17, 100])
def test_all_empty(count: int) -> None:
    dicts: list[dict[Any, Any]] = [{} if i % 2 else OrderedDict() for i in range(count)]
    assert native.all_empty(dicts)
    for each in dicts:
        each[1] = None
        assert not native.all_empty(dicts)
        del each[1]
    assert native.all_empty(dicts)


def test_all_empty_takes_a_list() -> None:
    with pytest.raises(TypeError, match="lists"):
        native.all_empty(())
    with pytest.raises(SystemError):  # what is no dictionary
        native.all_empty([1])


class Wrong(Exception):
    pass


def _raises() -> bool:
    raise Wrong


# name, questions, kept, whether all is quiet; the owner has {"a": -1, "b": False}
QUIET: list[tuple[str, list[Any], list[Any], bool]] = [
    ("nothing asked", [], [-1, False], True),
    ("nothing true", [bool, list, int, type(None)], [-1, False], True),
    ("one is true", [bool, lambda: 1], [-1, False], False),
    ("a tensor is true", [lambda: torch.ones(1)], [-1, False], False),
    ("another value", [bool], [-1, True], False),
    ("an equal one that is another", [bool], [-1, 0], False),
]


@pytest.mark.parametrize("quiet", [native.quiet, native._quiet], ids=["native", "portable"])
@pytest.mark.parametrize(("questions", "kept", "expected"), [pytest.param(*rest, id=name) for name, *rest in QUIET])
def test_quiet(questions: list[Any], kept: list[Any], expected: bool, quiet: Any) -> None:
    owner = {"a": -1, "b": False}
    assert quiet(questions, kept, [owner, owner], ["a", "b"]) is expected
    assert quiet([], [None], [owner], ["c"]) is True  # a name that is missing


@pytest.mark.parametrize("quiet", [native.quiet, native._quiet], ids=["native", "portable"])
def test_quiet_passes_errors_on(quiet: Any) -> None:
    with pytest.raises(Wrong):
        quiet([bool, _raises], [], [], [])
    with pytest.raises(RuntimeError, match="ambiguous"):
        quiet([lambda: torch.ones(2)], [], [], [])

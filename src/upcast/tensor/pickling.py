"""Whole modules pickle in float16: the dictionary in which a patched module keeps its parameters knows how.

A bare parameter pickles as the float32 parameter that it is, which every reader understands. In a module the float16
memory is written instead, once for a weight that several modules hold.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from upcast.tensor.half_weight import HalfWeight, rebuild
from upcast.tensor.store import Region, Store


class Parameters(dict[str, Any]):
    """``module._parameters`` of a patched module: an ordinary dictionary in every other respect."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return unpacked, ([(name, _packed(value)) for name, value in self.items()],)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameters":
        from copy import deepcopy

        memo[id(self)] = copied = Parameters()
        copied.update({name: deepcopy(value, memo) for name, value in self.items()})
        return copied


class Packed:
    """What a pickle holds of one weight."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.region: Region | None = None
        self.wants_grad = False
        self.attributes: dict[str, Any] = {}

    def weight(self) -> HalfWeight:
        """Return the weight, the same each time."""
        made = self.__dict__.get("made")
        if made is None:
            made = self.__dict__["made"] = rebuild(self.store, self.region, self.wants_grad)
            made.__dict__.update(self.attributes)
        weight: HalfWeight = made
        return weight


def _packed(value: Any) -> Any:
    """Return what to pickle for a parameter; for the same weight the same object, so that ties are kept."""
    if not isinstance(value, HalfWeight) or not value.reclaim():
        return value
    packed: Packed = value.__dict__.setdefault("packed", Packed(value.store))
    packed.region, packed.wants_grad, packed.attributes = value.region, value.wants_grad, value.attributes()
    return packed


def unpacked(items: Iterable[tuple[str, Any]]) -> Parameters:
    """Return the dictionary that was pickled."""
    return Parameters({name: value.weight() if isinstance(value, Packed) else value for name, value in items})


def install(modules: Iterable[nn.Module]) -> None:
    """Have the modules that hold a HalfWeight pickle it as float16; modules that share a dictionary go on sharing."""
    made: dict[int, Parameters] = {}
    for module in modules:
        before = module._parameters
        if type(before) is dict and any(isinstance(value, HalfWeight) for value in before.values()):
            module.__dict__["_parameters"] = made.setdefault(id(before), Parameters(before))


def remove(modules: Iterable[nn.Module]) -> None:
    """Give the modules ordinary dictionaries again."""
    made: dict[int, dict[str, Any]] = {}
    for module in modules:
        before = module._parameters
        if type(before) is Parameters:
            module.__dict__["_parameters"] = made.setdefault(id(before), dict(before))

"""The rows of one layer of a float16 KV cache: with room for more, and never written again once handed out."""

from typing import Any

from torch import Tensor

from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.store import Fallbacks

_handed_out = Fallbacks("a KV cache")  # what is upcast of a cache are rows in use, not weights: counted apart


def hand_out(stored: Tensor) -> HalfWeight:
    """Return float16 rows as float32 to everyone who looks."""
    return HalfWeight(stored, _handed_out)


class RowBuffers:
    """Keys and values (B, H, S, D) with room, and how many rows were ever written.

    Layers that are copies of one another share them. Rows that have been handed out are never written again: after a
    crop, say, someone may still hold them, and the rows go to new buffers.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: int) -> None:
        self.keys, self.values, self.rows = keys, values, rows
        self.room = keys.shape[2]
        self.handed: tuple[HalfWeight, HalfWeight] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "handed": None}

    def hand_out(self, rows: int) -> tuple[HalfWeight, HalfWeight]:
        """Return the first ``rows`` rows, which are in use from now on."""
        handed = hand_out(self.keys.narrow(2, 0, rows)), hand_out(self.values.narrow(2, 0, rows))
        if rows >= self.rows:  # fewer, of a layer that went back to where it was before others wrote on
            self.rows, self.handed = rows, handed
        return handed

    def handed_out(self, keys: Any, values: Any) -> bool:
        """Whether these are the very rows that were handed out last, and still float16."""
        handed = self.handed
        if handed is None or keys is not handed[0] or values is not handed[1] or type(keys) is not HalfWeight:
            return False
        return type(values) is HalfWeight and keys.store.half is not None and values.store.half is not None

    def fit(self, keys: Any, values: Any, before: int, after: int) -> bool:
        """Whether ``keys`` and ``values`` are the first ``before`` rows of these, and ``after`` have room."""
        if before != self.rows or after > self.room:
            return False
        return self.handed_out(keys, values) or (_begins(self.keys, keys) and _begins(self.values, values))


def _begins(buffer: Tensor, held: Any) -> bool:
    """Whether ``held`` still is the first rows of the buffer: beams reorder them."""
    if not isinstance(held, HalfWeight) or held.shape[:2] != buffer.shape[:2]:
        return False
    stored = held.stored
    return stored.data_ptr() == buffer.data_ptr() and stored.stride() == buffer.stride()

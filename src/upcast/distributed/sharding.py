"""How dimensions are divided between ranks; parts may be uneven.

Where a part may go to any rank, the parts move on by one rank from layer to layer: what does not divide evenly in one
layer evens out over the layers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcast.core.errors import UpcastError

Range = tuple[int, int]


@dataclass(frozen=True)
class Heads:
    """The query heads and the query groups (key and value heads) of one rank, each as (first, end)."""

    heads: Range
    groups: Range


@dataclass(frozen=True)
class Cut:
    """What a rank takes of a tensor: these ranges of one dimension, one after the other."""

    dim: int
    ranges: tuple[Range, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the rank's part: a view where the bytes lie together, else a copy."""
        parts = [tensor.narrow(self.dim, start, end - start) for start, end in self.ranges]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, self.dim)


def even(total: int, parts: int, what: str) -> list[Range]:
    """Divide ``total`` into ``parts`` ranges in order, of sizes that differ by one at most.

    Raises:
        UpcastError: there are more parts than there is to divide.
    """
    if parts > total:
        raise UpcastError(
            f"{parts} ranks for {total} {what}; every rank needs at least one. Start at most {total} processes."
        )
    edges = [total * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


def turned(parts: Sequence[object], rank: int, turn: int) -> int:
    """Return which of ``parts`` is the one of ``rank`` in layer ``turn``."""
    return (rank + turn) % len(parts)


def divide_heads(heads: int, groups: int, ranks: int) -> list[Heads]:
    """Divide the heads of one attention: whole query groups, or parts of one where there are more ranks than groups.

    Ranks that share a group each hold its key and value: that is replicated.

    Raises:
        UpcastError: there are more ranks than heads.
    """
    each = heads // groups
    if ranks <= groups:
        return [Heads((first * each, end * each), (first, end)) for first, end in even(groups, ranks, "query groups")]
    if ranks > heads:
        even(heads, ranks, "attention heads")
    parts = []
    for group, (first, end) in enumerate(even(ranks, groups, "query groups")):
        for start, stop in even(each, end - first, f"heads in each of {groups} query groups"):
            parts.append(Heads((group * each + start, group * each + stop), (group, group + 1)))
    return parts

"""Where new positions stand in LitGPT's caches and masks, and whether they are what the kernels take."""

import functools
from typing import Any

import torch
from torch import Tensor


class CachePosition:
    """Where the new positions stand: ``start`` for the mask, ``write`` in the cache (None: there is no cache)."""

    __slots__ = ("cache", "start", "write")

    def __init__(self, start: int, write: int = 0, cache: Any = None) -> None:
        self.start, self.write, self.cache = start, write, cache


def first_of_run(input_pos: Tensor, time: int) -> int | None:
    """Return the first of ``time`` consecutive positions, or None if ``input_pos`` is anything else."""
    if input_pos.dim() != 1 or input_pos.dtype != torch.int64:
        return None
    positions = input_pos.tolist()
    if len(positions) != time or not positions or positions[0] < 0:
        return None
    start = int(positions[0])
    return start if time == 1 or positions == list(range(start, start + time)) else None


def positions(size: int, ring: bool, capped: bool, start: int, time: int, maxp1: int | None) -> tuple[int, int] | None:
    """Return (start for the mask, where to write) in a cache of ``size``; None if that is for LitGPT to say.

    Args:
        size: positions that the cache holds.
        ring: whether it is the ring buffer of a sliding window.
        capped: whether scores are softcapped.
        start: the first of ``time`` new positions.
        maxp1: LitGPT's ``input_pos_maxp1``.
    """
    end = start + time
    if maxp1 is not None and maxp1 < end:
        return None
    # Under a softcap LitGPT adds its boolean mask to the scores: that masks only where there is nothing to mask.
    if capped and not (time == 1 and (ring or maxp1 == end)):
        return None
    if end <= size:
        return start, start
    # A wrapped ring holds the last positions in any order, all of them seen by one new query.
    return (size - 1, start % size) if ring and time == 1 else None


def is_causal(mask: Tensor, start: int, time: int) -> bool:
    """Whether ``mask`` (1, 1, T, S) says what LitGPT's mask cache says: every query sees itself and what is before."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[:3] != (1, 1, time):
        return False
    size = mask.shape[3]
    if time == 1 and start < size:  # a few operations fewer, once per token
        return torch.equal(mask[0, 0, 0], _band(size)[size - 1 - start : 2 * size - 1 - start])
    seen = torch.arange(size).unsqueeze(0) <= torch.arange(start, start + time).unsqueeze(1)
    return torch.equal(mask[0, 0], seen)


@functools.lru_cache(maxsize=4)
def _band(size: int) -> Tensor:
    """Return ``size`` times True, then False: every row of a causal mask of that size is a part of it."""
    return torch.arange(2 * size, device="cpu") < size

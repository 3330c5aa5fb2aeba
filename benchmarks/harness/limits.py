"""What this machine does at most, measured in the minute that it is needed in: reading memory, multiplying, meeting.

No decoded token is faster than reading its weights once, and no product of matrices faster than its multiply-adds.
"""

import statistics
import time
from collections.abc import Callable

import torch

from upcast import kernels
from upcast.kernels import limits

BYTES = 268_000_000  # more than the caches of the machines that this is for
STREAMS = (1, 4, 8)
REPEATS = 3
ROUNDS = 2_000_000  # about 10 ms of multiply-adds
REGIONS, REGION_REPEATS = 1_000, 21  # about a millisecond of regions at a time


class Memory:
    """268 MB that are read from end to end, by torch's threads."""

    def __init__(self) -> None:
        self.numbers = torch.ones(BYTES // 4)

    def rates(self) -> dict[str, float]:
        """Return bytes per second of each way to read, the fastest of a few: streams per thread, or torch's own sum."""
        ways: dict[str, Callable[[], object]] = {"sum": self.numbers.sum}
        if _native():
            ways = {str(streams): lambda n=streams: limits.read_memory(self.numbers, n) for streams in STREAMS}  # type: ignore[misc]
        with torch.inference_mode():
            return {
                way: self.numbers.nbytes / min(_seconds(read) for _ in range(REPEATS)) for way, read in ways.items()
            }

    def rate(self) -> float:
        """Return bytes per second of the fastest way."""
        return max(self.rates().values())


def multiply_rate() -> float | None:
    """Return float32 operations per second of multiply-adds in registers; None without the native library."""
    if not _native():
        return None
    found = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        found.append(limits.multiply_adds(ROUNDS) / (time.perf_counter() - begin))
    return max(found)


def region_seconds() -> dict[str, float]:
    """Return the seconds of a region in which all threads do nothing: of a team, which is a barrier, and of the pool.

    Medians; empty without the native library, and where other programs kept the threads apart.
    """
    found: dict[str, list[float]] = {"team": [], "pool": []}
    for _ in range(REGION_REPEATS if _native() else 0):
        for way, times in found.items():
            begin = time.perf_counter()
            if limits.regions(REGIONS, together=way == "team"):
                times.append((time.perf_counter() - begin) / REGIONS)
    return {way: statistics.median(times) for way, times in found.items() if times}


def _native() -> bool:
    return kernels.describe().startswith("native")


def _seconds(read: Callable[[], object]) -> float:
    begin = time.perf_counter()
    read()
    return time.perf_counter() - begin

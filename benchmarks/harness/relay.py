"""The wire between two hosts where the kernel has no netem: frames that come in at one end leave at the other, late.

usage: python relay.py DESCRIPTOR DESCRIPTOR DELAY RATE: of two TAP devices, open; seconds; bit/s (inf: no limit)
"""

import contextlib
import os
import select
import sys
import time
from collections import deque

FRAME = 65_536  # bytes, of the longest
AT_ONCE = 64  # frames, before the other end has its turn


def forward(ends: tuple[int, int], delay: float, rate: float) -> None:
    """Carry frames between the descriptors ``ends``, each way as a link of ``rate`` bit/s and ``delay`` seconds does.

    Returns when an end is closed or its device is gone. A frame that finds the other device down is lost.
    """
    under_way: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}  # to each: when due, and what
    free = dict.fromkeys(ends, 0.0)  # when the wire to each has sent what it was given
    for end in ends:
        os.set_blocking(end, False)
    while True:
        due = min((frames[0][0] for frames in under_way.values() if frames), default=None)
        ready, _, _ = select.select(ends, (), (), None if due is None else max(0.0, due - time.monotonic()))
        for end in ready:
            to = ends[end == ends[0]]
            frames = _read(end)
            if frames is None:
                return
            now = time.monotonic()
            for frame in frames:
                free[to] = max(free[to], now) + len(frame) * 8 / rate
                under_way[to].append((free[to] + delay, frame))
        now = time.monotonic()
        for end, waiting in under_way.items():
            while waiting and waiting[0][0] <= now:
                with contextlib.suppress(OSError):
                    os.write(end, waiting.popleft()[1])


def _read(end: int) -> list[bytes] | None:
    frames: list[bytes] = []
    try:
        while len(frames) < AT_ONCE:
            frames.append(os.read(end, FRAME))
            if not frames[-1]:
                return None
    except BlockingIOError:
        return frames
    except OSError:
        return None
    return frames


def main(first: int, second: int, delay: float, rate: float) -> None:
    """Forward until a device is gone, ahead of whatever else wants the processor: it stands for a wire."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    forward((first, second), delay, rate)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))

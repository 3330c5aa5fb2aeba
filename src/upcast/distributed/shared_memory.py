"""Ranks of one host add and gather through memory that they share: messages take longer than a small model's block.

Each rank writes to its own segment, all meet at counters (`kernels.native.meet`), and each reads every segment; of a
sum all this is one call (`add_up`). Two sets of segments take turns: a rank that writes again has met the others once
more, and so they have read what was there.

The memory has no name in any folder, so nothing is left behind. Each rank holds a lock on one byte of it, which the
system takes from a process that ends in whatever way: a rank that is late and holds no lock is gone.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.kernels import native

with contextlib.suppress(ImportError):  # not on Windows, where `offer` refuses
    import fcntl

SEGMENT = 256 * 1024  # bytes that a rank writes before the others read; more goes in pieces
_LOOK = 50_000_000  # nanoseconds of waiting, before a look at whether the late rank lives
_LINE = 8  # int64 in each rank's line of counters
_TOKEN = 16  # bytes at the start, by which the memory is known to be the right one


class Shared:
    """The memory, as one rank sees it; ``file`` is its descriptor, of which this becomes the owner."""

    def __init__(self, file: int, rank: int, size: int, timeout: float) -> None:
        self.file, self.rank, self.timeout, self._turn = file, rank, timeout, 0
        self._memory: mmap.mmap | None = mmap.mmap(file, _bytes(size))
        start = mmap.PAGESIZE
        counters = torch.frombuffer(self._memory, dtype=torch.int64, count=size * _LINE, offset=start)
        self._counters = counters.view(size, _LINE)
        start += _counter_bytes(size)
        segments = torch.frombuffer(self._memory, dtype=torch.uint8, count=2 * size * SEGMENT, offset=start)
        self._bytes = segments.view(2, size, SEGMENT)
        self._floats = segments.view(torch.float32).view(2, size, SEGMENT // 4).unbind()
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def sum(self, x: Tensor) -> None:
        """Make ``x`` (float32, contiguous) the sum of every rank's, added in the order of ranks."""
        for piece in (x,) if x.numel() <= SEGMENT // 4 else x.view(-1).split(SEGMENT // 4):
            self._turn += 1
            self._wait(native.add_up, piece, self._floats[self._turn % 2])

    def gather(self, x: Tensor, out: Tensor) -> None:
        """Fill ``out`` (ranks, *x.shape) with every rank's ``x``; both contiguous, of any dtype."""
        mine, all_of_them = x.view(-1).view(torch.uint8), out.view(len(out), -1).view(torch.uint8)
        for start in range(0, len(mine), SEGMENT):
            self._turn += 1
            end = min(start + SEGMENT, len(mine))
            segments = self._bytes[self._turn % 2, :, : end - start]
            segments[self.rank].copy_(mine[start:end])
            self._wait(native.meet)
            all_of_them[:, start:end].copy_(segments)

    def close(self) -> None:
        """Let go: whoever still waits for this rank finds it gone."""
        if self.file >= 0:
            os.close(self.file)  # and with it the lock
            self.file = -1

    def _wait(self, call: Callable[..., int], *args: Tensor) -> None:
        """Call ``call``, and again until no rank is late."""
        if self.file < 0:
            raise RuntimeError("this rank has left")
        end = time.monotonic() + self.timeout
        while (late := call(*args, self._counters, self.rank, self._turn, _LOOK)) >= 0:
            if not self._lives(late):
                raise RuntimeError(f"rank {late} let go of the shared memory")
            if time.monotonic() > end:
                raise RuntimeError(f"timed out after {self.timeout:g} s of waiting for rank {late}")

    def _lives(self, rank: int) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, rank)
        return False


def host() -> str:
    """Return what tells this host from others; containers and namespaces with a network of their own count as hosts."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"


def offer(size: int) -> tuple[Any, int]:
    """Make the memory; return (host, process, descriptor, token) for the others and the descriptor.

    Raises:
        OSError: this system has no such memory, or not enough of it.
    """
    if not hasattr(os, "memfd_create") or kernels.name() != "native":
        raise OSError("no memory without a name, or no native kernels")
    file = os.memfd_create("upcast")
    try:
        os.posix_fallocate(file, 0, _bytes(size))  # now, not where a sum would die of it
        token = os.urandom(_TOKEN)
        os.pwrite(file, token, 0)
        return (host(), os.getpid(), file, token), file
    except OSError:
        os.close(file)
        raise


def accept(given: tuple[Any, ...]) -> int:
    """Return a descriptor of the memory that another rank made.

    Raises:
        OSError: that rank is on another host, or its memory cannot be opened from here.
    """
    where, process, number, token = given
    if where != host() or kernels.name() != "native":
        raise OSError("another host, or no native kernels")
    file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    if os.pread(file, _TOKEN, 0) != token:
        os.close(file)
        raise OSError("another process has that number")
    return file


def _counter_bytes(size: int) -> int:
    return -(-size * _LINE * 8 // mmap.PAGESIZE) * mmap.PAGESIZE


def _bytes(size: int) -> int:
    return mmap.PAGESIZE + _counter_bytes(size) + 2 * size * SEGMENT

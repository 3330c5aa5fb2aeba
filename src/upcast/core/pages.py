"""Weights in large pages: a token reads all of them, and the processor looks up an address for every page.

With pages of 2 MiB in place of 4 KiB a token of SmolLM2-135M takes a sixth less time on a virtual machine with AVX2,
where each lookup walks two tables. The system is asked, not told: where it has no such pages nothing else changes.
"""

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from upcast.core.memory_layout import bounds

PAGE = 2 << 20  # bytes of a large one
BLOCK = 32 << 20  # bytes asked for at once: pages that nobody writes to take no memory
SMALL = 64 << 10  # bytes below which a tensor has memory of its own
ALIGNMENT = 64
_MAPS = Path("/proc/self/maps")
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it


class Memory:
    """Where the float16 and packed weights of one model are put, one after the other.

    A block of it goes back to the system with the last tensor in it.
    """

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._last: int | None = None  # address of the last tensor
        self._before = self._used = 0

    def half_like(self, source: Tensor) -> Tensor:
        """Return an empty float16 tensor of the shape of ``source``, with a storage of its own."""
        if _HUGE is None or 2 * source.numel() < SMALL or not source.is_contiguous():
            return torch.empty_like(source, dtype=torch.float16)
        return self.empty(source.numel(), torch.float16).view(source.shape)

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return ``count`` numbers to be written to, with a storage of their own."""
        size = count * dtype.itemsize
        if _HUGE is None or size < SMALL:
            return torch.empty(count, dtype=dtype, device="cpu")
        if self._block is None or self._used + size > len(self._block):
            self._block, self._used = _block(max(size, BLOCK), _HUGE), 0
        numbers = torch.frombuffer(self._block, dtype=dtype, count=count, offset=self._used)
        self._last = numbers.data_ptr()
        self._before, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        return numbers

    def take_back(self, half: Tensor) -> None:
        """Give the place of the last tensor, which is not needed after all, to the next one."""
        if half.data_ptr() == self._last:
            self._used = self._before


def _block(size: int, advice: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(advice)
    return block


def read_ahead(path: Path) -> None:
    """Read a checkpoint that will be mapped, in large pages: all processes that map it share them.

    Only a file of which the system holds next to nothing, and that fits: what is in small pages already stays so, and
    the readers of an archive leave small pages all over it.
    """
    if _HUGE is None or not os.access(path, os.R_OK):  # its reader will say so
        return
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < PAGE or size > _free_bytes() // 2:
            return
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            if _cached_bytes(whole) > size // 16:
                return
        finally:
            with contextlib.suppress(BufferError):  # an interruption still holds it, and is what shall be heard
                whole.close()
        for start in range(0, size, PAGE):  # one by one: what is looked at counts as this process's memory
            with mmap.mmap(file.fileno(), min(PAGE, size - start), access=mmap.ACCESS_READ, offset=start) as page:
                with contextlib.suppress(OSError):
                    page.madvise(_HUGE)
                page[0]


def advise(path: Path) -> None:
    """Have the system hold a file that was just written in large pages: its writer leaves it in small ones."""
    if _HUGE is not None:
        with path.open("rb") as file, contextlib.suppress(OSError):  # a file system that cannot
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read_ahead(path)


def _cached_bytes(mapped: mmap.mmap) -> int:
    """Return how much of a mapped file the system holds in memory."""
    pages = -(-len(mapped) // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    start = ctypes.c_char.from_buffer(mapped)
    failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), states)
    return len(mapped) if failed else sum(state & 1 for state in states) * mmap.PAGESIZE


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE


def give_back_pages(tensor: Tensor) -> None:
    """Tell the system that the mapped pages of ``tensor`` are no longer needed, or they count as ours to the end.

    Nothing happens to memory that no file backs: its numbers would be lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or tensor.numel() == 0:
        return
    first, last = bounds(tensor)
    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    end = last // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and _of_a_file(start, end):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _of_a_file(start: int, end: int) -> bool:
    """Whether one mapping of a file holds these addresses; True where the system does not say (not Linux)."""
    if not _MAPS.exists():
        return True
    for line in _MAPS.read_bytes().split(b"\n")[:-1]:  # names of files may hold anything else
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(edge, 16) for edge in span.split(b"-"))
        if first <= start < last:
            return end <= last and inode != b"0"
    return False

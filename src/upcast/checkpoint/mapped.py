"""Weights that stay in their file, mapped: what happens to the file does not reach the model.

Whoever writes to a mapped file changes the memory of all who map it, and whoever truncates it takes the memory away.
On Linux a file can be held by a lease: the system makes writers wait until we have taken a copy of what we use. So a
loaded model is moved to mappings of ours that have one; see csrc/python/bind_files.cpp.
"""

import ctypes
import errno
import functools
import os
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from upcast.core.memory_layout import bounds, is_plain, plain
from upcast.kernels import held_files, native
from upcast.tensor.packed_weight import PackedWeight

_MAPS = Path("/proc/self/maps")
_ALIGNMENT = 16  # bytes; no number is larger
_GONE = (errno.ENOENT, errno.ENOTDIR)


@dataclass
class _Span:
    """Addresses that hold a piece of a file."""

    start: int
    end: int
    offset: int
    inode: int
    name: str

    def is_followed_by(self, other: "_Span") -> bool:
        """Whether the other one goes on where this one ends, in memory and in the file."""
        end = (self.end, self.offset + self.end - self.start, self.inode, self.name)
        return end == (other.start, other.offset, other.inode, other.name)


@dataclass
class _Piece:
    """Where tensors lie, in the file and in memory."""

    offset: int
    address: int
    size: int
    tensors: list[Tensor]

    def align(self) -> None:
        """Begin earlier where numbers of different sizes share the bytes, so that each lies at a multiple of its own.

        Elsewhere a tensor fills its storage, as a saver of tied weights wants to see.
        """
        if any((tensor.data_ptr() - self.address) % tensor.element_size() for tensor in self.tensors):
            room = self.offset % _ALIGNMENT
            self.offset, self.address, self.size = self.offset - room, self.address - room, self.size + room

    def move(self, memory: Tensor) -> None:
        """Have the tensors look at ``memory``, which holds the same bytes."""
        storage = memory.untyped_storage()
        for tensor in self.tensors:
            place = (tensor.data_ptr() - self.address) // tensor.element_size()
            tensor.data = torch.empty(0, dtype=tensor.dtype).set_(storage, place, tensor.shape, tensor.stride())

    def copy(self) -> Tensor:
        """Return a copy of the bytes."""
        memory = torch.empty(self.size, dtype=torch.uint8)
        ctypes.memmove(memory.data_ptr(), self.address, self.size)
        return memory


def hold(model: nn.Module) -> list[tuple[str, list[Tensor]]]:
    """Move what ``model`` holds in mapped files to mappings that no writer reaches.

    Nothing is copied, unless somebody has the file open for writing at this moment. Where the system gives no lease
    (the file is another user's, the file system has none), or the process has few descriptors left, tensors stay where
    they are, and are returned with the name.
    """
    spans = _spans()
    mappings: dict[tuple[str, int, int], list[_Piece]] = {}  # apart: one file may be mapped twice
    for tensor in _in_memory(model):
        span = _span_of(tensor, spans)
        if span is not None and not is_plain(tensor):
            tensor.data = plain(tensor.detach())
        elif span is not None:
            start, end = bounds(tensor)
            piece = _Piece(span.offset + start - span.start, start, end - start, [tensor])
            mappings.setdefault((span.name, span.inode, span.start - span.offset), []).append(piece)
    return [
        (name, [tensor for piece in pieces for tensor in piece.tensors])
        for (listed, inode, _), pieces in mappings.items()
        for name in (_spelled(listed, inode),)
        if not _is_held(name, inode, _united(pieces))
    ]


def _in_memory(model: nn.Module) -> list[Tensor]:
    """Return the tensors of ``model`` as they lie in memory: of packed weights the bytes."""
    found = [each.blob if isinstance(each, PackedWeight) else each for each in (*model.parameters(), *model.buffers())]
    return list({id(each): each for each in found}.values())


def is_listed() -> bool:
    """Whether the system says what is mapped where; Linux does."""
    return _MAPS.exists()


def _spans() -> list[_Span]:
    """Return the mappings of files in this process, in the order of addresses; none where the system does not say."""
    spans: list[_Span] = []
    for line in os.fsdecode(_MAPS.read_bytes()).split("\n")[:-1] if is_listed() else ():
        addresses, rights, offset, _, inode, *name = line.split(maxsplit=5)
        if inode == "0" or not name or "s" in rights:
            continue
        start, end = (int(edge, 16) for edge in addresses.split("-"))
        found = _Span(start, end, int(offset, 16), int(inode), name[0])
        before = spans[-1] if spans else None
        if before and before.is_followed_by(found):
            before.end = end
        else:
            spans.append(found)
    return spans


def _spelled(listed: str, inode: int) -> str:
    """Return the name of a mapped file: a newline in it, and a backslash before the digits 012, are listed alike."""
    other = listed.replace("\\012", "\n")
    try:
        return other if os.stat(other).st_ino == inode else listed
    except OSError:
        return listed


def _span_of(tensor: Tensor, spans: list[_Span]) -> _Span | None:
    """Return the mapping that holds all numbers of ``tensor``."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return None
    if tensor.is_conj() or not tensor.numel():
        return None
    start, end = bounds(tensor)
    at = bisect_right(spans, start, key=lambda span: span.start) - 1
    return spans[at] if at >= 0 and end <= spans[at].end else None


def _united(pieces: list["_Piece"]) -> list["_Piece"]:
    """Return the pieces, those that overlap (tied tensors, views) as one."""
    united: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        last = united[-1] if united else None
        if last and piece.offset < last.offset + last.size:
            last.size = max(last.size, piece.offset + piece.size - last.offset)
            last.tensors += piece.tensors
        else:
            united.append(piece)
    for piece in united:
        piece.align()
    return united


def _is_held(name: str, inode: int, pieces: list["_Piece"]) -> bool:
    """Move the pieces to a mapping that is held, or to copies; False where the system gives no lease."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # deleted: nobody finds the file that is mapped; or there are too many open files
        return error.errno in _GONE
    taken = False
    try:
        status = os.fstat(descriptor)
        if status.st_ino != inode or any(piece.offset + piece.size > status.st_size for piece in pieces):
            return True
        if not native.available() or _is_among_the_last(descriptor):
            return False
        failed, address, parts = held_files.hold_file(descriptor, status.st_size, [(p.offset, p.size) for p in pieces])
        taken = not failed
        if taken:
            _watch_forks()
            for piece, part in zip(pieces, parts, strict=True):
                piece.move(_memory(address + piece.offset, piece.size, part))
        elif failed == errno.EAGAIN:  # it is open for writing: what is written next would be in the model
            for piece in pieces:
                piece.move(piece.copy())
        return failed in (0, errno.EAGAIN)
    finally:
        if not taken:
            os.close(descriptor)


def _is_among_the_last(descriptor: int) -> bool:
    """Whether a descriptor is of the last quarter that this process may have: the program wants them."""
    limit = os.sysconf("SC_OPEN_MAX")  # -1: as many as it likes
    return 4 * descriptor >= 3 * limit > 0


def _memory(address: int, size: int, part: int) -> Tensor:
    """Return a part of a file that is held, as bytes; it is given back with the last tensor in it."""
    memory = (ctypes.c_char * size).from_address(address)
    held_files.drop_with(memory, part)
    return torch.frombuffer(memory, dtype=torch.uint8)


@functools.cache
def _watch_forks() -> None:
    """Have every child watch over what it has inherited."""
    os.register_at_fork(
        before=held_files.before_fork,
        after_in_parent=functools.partial(held_files.after_fork, False),
        after_in_child=functools.partial(held_files.after_fork, True),
    )

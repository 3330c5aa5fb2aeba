"""torch.save files that are written in place: laid out first, filled tensor by tensor, sealed with checksums."""

import ctypes
import errno
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# The zip format, APPNOTE.TXT 4.3: sizes of the fixed parts, and where CRC-32 and the variable lengths stand in them.
_ENTRY, _ENTRY_CRC, _ENTRY_LENGTHS = 46, 16, 28
_LOCAL, _LOCAL_LENGTHS = 30, 26
_DESCRIPTOR = b"PK\x07\x08"
_READ = 1 << 20


@dataclass(frozen=True)
class Extent:
    """Where a storage lies in the file, and where the file's directory tells its checksum."""

    start: int
    bytes: int
    listed: int


def lay_out(path: Path, state: dict[str, Tensor]) -> None:
    """Write the torch.save file of ``state`` with room for its numbers, all allocated, but without the numbers.

    Raises:
        OSError: the file system has no room.
    """
    try:
        # "skip data" is a thread's own: no interruption of this one can leave it on
        with ThreadPoolExecutor(1) as other:
            other.submit(_save_empty, path, state).result()
    except RuntimeError as error:  # torch's words for a write that the system refused
        raise OSError(errno.ENOSPC, str(error).splitlines()[0], str(path)) from None
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # or a disk would be found full in the middle of the work
            try:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system that cannot
                    raise


def _save_empty(path: Path, state: dict[str, Tensor]) -> None:
    with torch.serialization.skip_data():
        torch.save(state, path)


def places(path: Path) -> list[Extent]:
    """Return where the storages lie, in the order of saving.

    Raises:
        zipfile.BadZipFile: this is no such file, or not all of it. (Of damaged ones `zipfile` raises more.)
    """
    with zipfile.ZipFile(path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    found: dict[int, Extent] = {}
    with path.open("rb") as file:
        for entry in entries:
            storage = re.fullmatch(r"[^/]+/data/(\d+)", entry.filename)
            if storage:
                header = _LOCAL + sum(_lengths(file, entry.header_offset + _LOCAL_LENGTHS, 2))
                found[int(storage[1])] = Extent(entry.header_offset + header, entry.file_size, at + _ENTRY_CRC)
            at += _ENTRY + sum(_lengths(file, at + _ENTRY_LENGTHS, 3))
    if sorted(found) != list(range(len(found))):
        raise zipfile.BadZipFile("storages are missing")
    return [found[number] for number in range(len(found))]


def _lengths(file: BinaryIO, position: int, count: int) -> tuple[int, ...]:
    file.seek(position)
    return struct.unpack(f"<{count}H", file.read(2 * count))


def write(file: BinaryIO, place: Extent, tensor: Tensor) -> int:
    """Write a contiguous tensor to its place, and hand it to the system; return its CRC-32."""
    content = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""
    file.seek(place.start)
    file.write(content)
    file.flush()
    return zlib.crc32(content)


def checksum(file: BinaryIO, place: Extent) -> int:
    """Return the CRC-32 of what the file holds at a place."""
    file.seek(place.start)
    crc, left = 0, place.bytes
    while left and (piece := file.read(min(_READ, left))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc


def seal(path: Path, checksums: Sequence[int]) -> None:
    """Put the CRC-32 of each storage, in the order of saving, where the zip format wants it, and all on the disk."""
    found = places(path)
    with path.open("r+b") as file:

        def put(position: int, content: bytes) -> None:
            file.seek(position)
            file.write(content)

        for place, checksum in zip(found, checksums, strict=True):
            crc = struct.pack("<L", checksum)
            put(place.listed, crc)
            file.seek(place.start + place.bytes)
            if file.read(len(_DESCRIPTOR)) == _DESCRIPTOR:
                put(place.start + place.bytes + len(_DESCRIPTOR), crc)
        file.flush()
        os.fsync(file.fileno())


def check(path: Path, notice: Callable[[int], object]) -> None:
    """Read a sealed file back from the disk and compare every checksum; ``notice`` is told of the bytes read.

    Raises:
        zipfile.BadZipFile: a checksum differs, or this is not a zip file.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from what the system remembers of the writing
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as content:
                    while piece := content.read(_READ):
                        notice(len(piece))

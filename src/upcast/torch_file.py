"""torch.save files that are written in place: laid out first, filled tensor by tensor, sealed with checksums."""

import ctypes
import mmap
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

# The zip format, APPNOTE.TXT 4.3: sizes of the fixed parts, and where CRC-32 and the variable lengths stand in them.
_ENTRY, _ENTRY_CRC, _ENTRY_LENGTHS = 46, 16, 28
_LOCAL, _LOCAL_LENGTHS = 30, 26
_DESCRIPTOR = b"PK\x07\x08"
_READ = 1 << 20


def lay_out(path: Path, state: dict[str, Tensor]) -> None:
    """Write the torch.save file of ``state`` with room for its numbers, all allocated, but without the numbers.

    Raises:
        OSError: the file system has no room.
    """
    with torch.serialization.skip_data():
        torch.save(state, path)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # or a full disk would show as a bus error, in the middle of the writing
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def mapped_for_writing(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch.save file; what is written to them is written to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        state: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
    return state


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's bytes."""
    if not tensor.nbytes:
        return 0
    return zlib.crc32((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def seal(path: Path, checksums: Sequence[int]) -> None:
    """Put the CRC-32 of each storage, in the order of saving, where the zip format wants it."""
    with zipfile.ZipFile(path) as archive:
        entries, at = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:

        def lengths(position: int, count: int) -> tuple[int, ...]:
            file.seek(position)
            return struct.unpack(f"<{count}H", file.read(2 * count))

        def write(position: int, content: bytes) -> None:
            file.seek(position)
            file.write(content)

        for entry in entries:
            storage = re.fullmatch(r"[^/]+/data/(\d+)", entry.filename)
            if storage:
                crc = struct.pack("<L", checksums[int(storage[1])])
                write(at + _ENTRY_CRC, crc)
                header = _LOCAL + sum(lengths(entry.header_offset + _LOCAL_LENGTHS, 2))
                end = entry.header_offset + header + entry.file_size
                file.seek(end)
                if file.read(len(_DESCRIPTOR)) == _DESCRIPTOR:
                    write(end + len(_DESCRIPTOR), crc)
            at += _ENTRY + sum(lengths(at + _ENTRY_LENGTHS, 3))
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

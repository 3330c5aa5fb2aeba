"""Places in a file that is written in place: laid out with all its room, and filled tensor by tensor."""

import ctypes
import errno
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

READ = 1 << 20  # bytes at once


@dataclass(frozen=True)
class Extent:
    """Where numbers lie in the file, and where its directory tells their checksum (0: it tells none)."""

    start: int
    bytes: int
    listed: int = 0


def allocate(file: BinaryIO) -> None:
    """Have the disk give all of a file its room, or it would be found full in the middle of the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system that cannot
                raise


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
    while left and (piece := file.read(min(READ, left))):
        crc, left = zlib.crc32(piece, crc), left - len(piece)
    return crc


def forget(path: Path) -> None:
    """Have what is read next come from the disk, not from what the system remembers of the writing."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sync(path: Path) -> None:
    """Have a file on the disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())

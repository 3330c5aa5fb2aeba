"""torch.save files that are written in place: laid out first, filled tensor by tensor, sealed with checksums."""

import errno
import os
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from upcast.checkpoint.extents import READ, Extent, allocate, forget

# The zip format, APPNOTE.TXT 4.3: sizes of the fixed parts, and where CRC-32 and the variable lengths stand in them.
_ENTRY, _ENTRY_CRC, _ENTRY_LENGTHS = 46, 16, 28
_LOCAL, _LOCAL_LENGTHS = 30, 26
_DESCRIPTOR = b"PK\x07\x08"


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
        allocate(file)


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


def places_of(path: Path, sizes: Sequence[int] | None = None) -> list[Extent] | None:
    """Return `places`, if there is a file with room for storages; of these sizes, if any are said."""
    try:
        found = places(path)
    except FileNotFoundError:
        return None
    except OSError:
        raise
    except Exception:  # damaged archives fail in many ways
        return None
    return found if sizes in (None, [place.bytes for place in found]) else None


def _lengths(file: BinaryIO, position: int, count: int) -> tuple[int, ...]:
    file.seek(position)
    return struct.unpack(f"<{count}H", file.read(2 * count))


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
    forget(path)
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as content:
                while piece := content.read(READ):
                    notice(len(piece))

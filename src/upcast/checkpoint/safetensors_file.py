"""safetensors files: read with suspicion, mapped, and written in place.

Such a file is eight bytes that say how long the header is, the header (JSON: name -> dtype, shape, where its bytes
begin and end), and the bytes, without a gap. The library reads such files too; here nothing is believed that the file's
size does not bear out, and a file can be made before its numbers are there.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from upcast.checkpoint import overwriting
from upcast.checkpoint.extents import Extent, allocate
from upcast.core.errors import UpcastError, describe

ALIGNMENT = 64  # bytes: tensors whose size is a multiple of it lie at multiples of it
LARGEST = 100_000_000  # bytes of a header, as the library has it
DEEPEST = 64  # dimensions
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its kind, and where its bytes begin, counted from the file's first."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """How many they are."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file says of itself: its tensors in the header's order, and texts beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


class _Odd(Exception):
    """What is wrong with a header."""


def read_header(path: Path) -> Header:
    """Return the header of the file, whose every byte it accounts for.

    Raises:
        UpcastError: there is no such file, or it is none of this kind.
    """
    if not os.path.isfile(path):  # Path's own raises for some names
        raise UpcastError(f"no file {path}; a checkpoint folder holds it. Check the path, or download the model.")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _length(file.read(_LENGTH.size), size)
            fields = _parsed(file.read(length))
        metadata = fields.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise _Odd("its __metadata__ holds no texts")
        entries = {name: _entry(name, row, _LENGTH.size + length) for name, row in fields.items()}
        _check_places(entries, _LENGTH.size + length, size)
    except _Odd as odd:
        refuse(path, str(odd))
    return Header(entries, metadata)


def peek(path: Path) -> dict[str, Any]:
    """Return what the metadata of a file says; nothing of one that has none, or is for its reader to refuse."""
    try:
        with path.open("rb") as file:
            length = _length(file.read(_LENGTH.size), os.fstat(file.fileno()).st_size)
            found = _parsed(file.read(length)).get(_METADATA)
    except (OSError, _Odd):
        return {}
    return found if isinstance(found, dict) else {}


def refuse(path: Path, found: str) -> NoReturn:
    """Raise the error for a file that is not what it should be."""
    raise UpcastError(
        f"{path} cannot be read ({found}); its header must say what its bytes are. Download or convert it again."
    )


def _length(first: bytes, size: int) -> int:
    if len(first) < _LENGTH.size:
        raise _Odd(f"it has {size} bytes, and a header begins with 8")
    (length,) = _LENGTH.unpack(first)
    if length > min(size - _LENGTH.size, LARGEST):
        raise _Odd(f"a header of {length:,} bytes in a file of {size:,}")
    return int(length)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _Odd(f"its header is no JSON: {describe(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise _Odd("its header holds no names")
    return fields


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names differ; raise ValueError where one stands twice: readers would differ."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def is_count(value: object) -> bool:
    """Whether a value is an integer that can count something."""
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, row: Any, begin: int) -> Entry:
    shown = repr(name[:100])
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise _Odd(f"the entry of {shown} is not dtype, shape and data_offsets")
    shape, places = row["shape"], row["data_offsets"]
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPES:
        raise _Odd(f"{shown} is of an unknown dtype, {str(row['dtype'])[:50]!r}")
    if not isinstance(shape, list) or len(shape) > DEEPEST or not all(map(is_count, shape)):
        raise _Odd(f"{shown} has no shape: {str(shape)[:100]}")
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise _Odd(f"{shown} is too large: {str(shape)[:100]}")
    if not isinstance(places, list) or len(places) != 2 or not all(map(is_count, places)):
        raise _Odd(f"{shown} has no place: {str(places)[:100]}")
    entry = Entry(DTYPES[row["dtype"]], tuple(shape), begin + places[0])
    if places[1] - places[0] != entry.bytes:
        raise _Odd(f"{shown} has {places[1] - places[0]} bytes, and its shape takes {entry.bytes}")
    return entry


def _check_places(entries: Mapping[str, Entry], begin: int, end: int) -> None:
    """Refuse bytes that belong to two tensors, or to none."""
    for name, entry in sorted(entries.items(), key=lambda each: (each[1].start, each[1].bytes)):
        if entry.start != begin:
            raise _Odd(f"{name[:100]!r} begins at byte {entry.start}, where byte {begin} is next")
        begin += entry.bytes
    if begin != end:
        raise _Odd(f"its tensors end at byte {begin}, and it has {end}")


def mapped(path: Path, header: Header) -> dict[str, Tensor]:
    """Return the tensors, mapped into memory rather than read."""
    size = path.stat().st_size
    storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {name: _tensor(storage, entry) for name, entry in header.entries.items()}
    overwriting.watch_what_was_read(path, tensors.values())
    return tensors


def _tensor(storage: torch.UntypedStorage, entry: Entry) -> Tensor:
    place, rest = divmod(entry.start, entry.dtype.itemsize)
    if rest:  # no number of this size begins there
        raw = torch.empty(0, dtype=torch.uint8).set_(storage, entry.start, (entry.bytes,), (1,))
        return raw.clone().view(entry.dtype).view(entry.shape)
    steps = torch.empty(entry.shape, device="meta").stride()
    return torch.empty(0, dtype=entry.dtype).set_(storage, place, entry.shape, steps)


def checksum(path: Path) -> int:
    """Return a checksum of the header and of both ends of each tensor: other weights differ there."""
    header = read_header(path)
    crc = zlib.crc32(repr(header).encode())
    with path.open("rb") as file:
        for entry in header.entries.values():
            for place in (entry.start, max(entry.start, entry.start + entry.bytes - _END)):
                file.seek(place)
                crc = zlib.crc32(file.read(min(_END, entry.bytes)), crc)
    return crc


_END = 4096  # bytes


# --- writing ----------------------------------------------------------------------------------------------------------


def lay_out(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Extent]:
    """Write the file of ``state`` with room for its numbers, all allocated, but without the numbers.

    ``metadata``: texts to be kept in the header. Returns the places of the numbers, in the order of ``state``.

    Raises:
        OSError: the file system has no room.
    """
    header, found = _laid_out(state, metadata)
    with path.open("w+b") as file:
        file.write(header)
        file.truncate(len(header) + sum(place.bytes for place in found))
        file.flush()
        allocate(file)
    return found


def is_laid_out(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether there is the file that `lay_out` makes, whatever the numbers in it."""
    header, found = _laid_out(state, metadata)
    if not path.is_file() or path.stat().st_size != len(header) + sum(place.bytes for place in found):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def places(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[Extent]:
    """Return where the numbers of ``state`` lie in the file that `lay_out` makes."""
    return _laid_out(state, metadata)[1]


def _laid_out(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Extent]]:
    """Return the header, padded so that the numbers begin at a multiple of ALIGNMENT, and the places."""
    at, offsets = 0, dict[str, int]()
    for name in _in_order(state):
        offsets[name], at = at, at + state[name].nbytes
    rows: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    for name, tensor in state.items():
        ends = [offsets[name], offsets[name] + tensor.nbytes]
        rows[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(_LENGTH.size + len(text)) // ALIGNMENT) * ALIGNMENT - _LENGTH.size
    header = _LENGTH.pack(length) + text.ljust(length)
    return header, [Extent(len(header) + offsets[name], tensor.nbytes) for name, tensor in state.items()]


def _in_order(state: Mapping[str, Tensor]) -> Sequence[str]:
    """Return the names as their bytes follow: what fills whole lines of memory first, then by the numbers' size."""
    return sorted(state, key=lambda name: (state[name].nbytes % ALIGNMENT > 0, -state[name].dtype.itemsize))


def without_numbers(dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """Return a tensor that only says how large it is."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")

"""Packed weights in a safetensors file: what the file says of them, and the file as the tensors that it stands for.

docs/concepts/packed-format.md is the description for others. A packed weight is one flat uint8 tensor, the blob of
`upcast.kernels.packed_matrix`, filled up with zeros to whole lines of memory; what it stands for is said in the file's
metadata. What is not said there is an ordinary tensor.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcast.checkpoint import safetensors_file
from upcast.checkpoint.safetensors_file import ALIGNMENT, DTYPES, NAMES, Entry, Header, is_count
from upcast.core.errors import UpcastError, describe
from upcast.kernels import packed
from upcast.kernels.packed_matrix import RECORD, PackedMatrix
from upcast.tensor.packed_weight import PackedStore, PackedWeight
from upcast.tensor.store import Fallbacks

KEY = "upcast.packed"
VERSION = 1
BORN = {NAMES[dtype]: dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True)
class Packed:
    """What a file says of one packed weight.

    Attributes:
        dtype: of the weight before it was packed.
        shape: of the weight.
        rows, columns: of the matrix that is packed; they follow from the shape.
        escapes: as `PackedMatrix` has them.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    columns: int
    escapes: int

    @staticmethod
    def of(dtype: torch.dtype, shape: tuple[int, ...], escapes: int) -> "Packed":
        """Return what is said of a weight of this shape."""
        columns = math.prod(shape[1:]) if len(shape) > 2 and shape[-1] < RECORD else shape[-1]
        return Packed(dtype, shape, math.prod(shape) // columns, columns, escapes)

    @property
    def size(self) -> int:
        """The bytes of the blob."""
        return packed.size_of(self.rows, self.columns, self.escapes)

    @property
    def stored_size(self) -> int:
        """The bytes of the blob in a file: whole lines of memory."""
        return -(-self.size // ALIGNMENT) * ALIGNMENT

    def matrix(self, stored: Tensor) -> PackedMatrix:
        """Return the matrix in bytes of `stored_size`."""
        return PackedMatrix(stored[: self.size], self.rows, self.columns, self.escapes, 0, self.rows)


@dataclass(frozen=True)
class Description:
    """What a file says of its packed weights.

    Attributes:
        tensors: name -> what that one is.
        tied: name of a tensor that the file does not hold -> name of the one whose numbers it has.
    """

    tensors: dict[str, Packed]
    tied: dict[str, str]

    def text(self) -> str:
        """Return the text to be kept under KEY."""
        rows = {
            name: {
                "dtype": NAMES[each.dtype],
                "shape": list(each.shape),
                "rows": each.rows,
                "columns": each.columns,
                "escapes": each.escapes,
            }
            for name, each in self.tensors.items()
        }
        return json.dumps({"version": VERSION, "tensors": rows, "tied": self.tied}, separators=(",", ":"))


class _Odd(Exception):
    """What is wrong with a description."""


def is_packed(path: Path) -> bool:
    """Whether a file says that it holds packed weights, of this version or another, whatever else it says."""
    return KEY in safetensors_file.peek(path)


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the file by name, mapped: packed ones as PackedWeights, tied ones as the same tensor.

    Raises:
        UpcastError: it is no such file, of another version, or anything in it does not fit the rest.
    """
    header = safetensors_file.read_header(path)
    described = _described(path, header)
    found: dict[str, Tensor] = {}
    tied: dict[str, list[str]] = {}
    for name, other in described.tied.items():
        tied.setdefault(other, []).append(name)
    for name, tensor in safetensors_file.mapped(path, header).items():
        what = described.tensors.get(name)
        whole = tensor if what is None else _weight(path, name, what, tensor)
        found.update(dict.fromkeys((name, *tied.get(name, ())), whole))
    return found


def metadata(path: Path) -> dict[str, str]:
    """Return the other texts that a file keeps in its header."""
    return {name: text for name, text in safetensors_file.read_header(path).metadata.items() if name != KEY}


def _weight(path: Path, name: str, what: Packed, stored: Tensor) -> PackedWeight:
    matrix = what.matrix(stored)
    try:
        packed.check(matrix)
    except UpcastError as error:
        raise UpcastError(f"{path}: {name[:300]}: {error}") from None
    store = PackedStore(matrix, what.shape, Fallbacks())
    store.before = what.dtype
    weight = PackedWeight(store)
    weight.wants_grad = True  # as parameters do: else making one of it, torch would ask for gradients
    return weight


def _described(path: Path, header: Header) -> Description:
    text = header.metadata.get(KEY)
    if text is None:
        raise UpcastError(
            f"{path} holds no packed weights: its header has no {KEY!r}; `python -m upcast convert FOLDER --storage "
            "packed` writes such files. Check the path, or convert the checkpoint again."
        )
    try:
        fields = json.loads(text, object_pairs_hook=safetensors_file.once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON: {describe(error)[:200]}") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION or type(version) is not int:
        raise UpcastError(
            f"{path} holds packed weights of version {str(version)[:50]!r}; this upcast reads version {VERSION}. "
            "Update upcast, or convert the checkpoint again."
        )
    try:
        return _checked(fields, header.entries)
    except _Odd as odd:
        raise _damaged(path, str(odd)) from None


def _damaged(path: Path, why: str) -> UpcastError:
    return UpcastError(
        f"{path}: what it says of its packed weights is wrong ({why}); it must fit the bytes beside it. Download or "
        "convert the checkpoint again."
    )


def _checked(fields: dict[str, Any], entries: Mapping[str, Entry]) -> Description:
    """Return the description, once every part of it is known to fit the file's tensors."""
    tensors, tied = _fields(fields, "version", "tensors", "tied", of="it")[1:]
    if not isinstance(tensors, dict) or not isinstance(tied, dict):
        raise _Odd("tensors and tied are not names with something to them")
    found = {name: _packed(name, row) for name, row in tensors.items()}
    for name, what in found.items():
        entry = entries.get(name)
        if entry is None:
            raise _Odd(f"the file has no {name[:100]!r}")
        if entry.dtype != torch.uint8 or len(entry.shape) != 1:
            raise _Odd(f"{name[:100]!r} is {NAMES[entry.dtype]} of shape {entry.shape}, and not a row of U8")
        if entry.bytes != what.stored_size:
            raise _Odd(f"{name[:100]!r} has {entry.bytes} bytes, and such a weight takes {what.stored_size}")
    for name, other in tied.items():
        if name in entries or not isinstance(other, str) or other not in entries:
            raise _Odd(f"{name[:100]!r} is tied to {str(other)[:100]!r}: the file must have the second alone")
    return Description(found, tied)


def _fields(row: Any, *names: str, of: str) -> list[Any]:
    if not isinstance(row, dict) or set(row) != set(names):
        extra = sorted(set(row) ^ set(names)) if isinstance(row, dict) else [type(row).__name__]
        raise _Odd(f"{of} must have {', '.join(names)} and nothing else; this is about {str(extra)[:200]}")
    return [row[name] for name in names]


def _packed(name: str, row: Any) -> Packed:
    shown = repr(name[:100])
    dtype, shape, rows, columns, escapes = _fields(row, "dtype", "shape", "rows", "columns", "escapes", of=shown)
    if not isinstance(dtype, str) or dtype not in BORN:
        raise _Odd(f"{shown} is of dtype {str(dtype)[:50]!r}, and can be one of {', '.join(BORN)}")
    if not isinstance(shape, list) or not 2 <= len(shape) <= safetensors_file.DEEPEST:
        raise _Odd(f"{shown} has shape {str(shape)[:100]}, and a packed weight has two dimensions or more")
    if not all(map(is_count, shape)) or not 0 < math.prod(shape) < 1 << 60:
        raise _Odd(f"{shown} has shape {str(shape)[:100]}, of no numbers or too many")
    if not all(map(is_count, (rows, columns, escapes))) or escapes > math.prod(shape):
        raise _Odd(f"{shown} has {str((rows, columns, escapes))[:100]} rows, columns and escapes")
    what = Packed.of(DTYPES[dtype], tuple(shape), escapes)
    if (what.rows, what.columns) != (rows, columns):
        raise _Odd(
            f"{shown} has {rows} rows of {columns}, and shape {tuple(shape)} makes {what.rows} of {what.columns}"
        )
    return what

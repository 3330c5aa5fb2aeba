"""Checkpoints on their way to float16: mapped from the file, converted tensor by tensor, pages given back."""

import os
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from upcast.checkpoint import overwriting
from upcast.core import console
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import is_plain, plain
from upcast.core.memory_layout import memory as numbers
from upcast.core.pages import Memory, give_back_pages
from upcast.core.tensor_ref import TensorRef
from upcast.kernels.rounding import Rounding, to_half
from upcast.patching.plan import CONVERT, PACKING, decide
from upcast.tensor.packed_weight import PackedWeight, fitting

Known = dict[str, tuple[torch.dtype, Rounding]]


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a ``torch.save`` file, mapped into memory rather than read.

    Raises:
        UpcastError: the file is missing, truncated, or holds anything but tensors (nothing of it is executed).
    """
    if not os.path.isfile(path):  # Path's own raises for some names
        raise UpcastError(f"no file {path}; a checkpoint folder holds one. Check the path, or download the model.")
    try:
        _check_begin(path)
        _check_archive(path)
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise UpcastError(
            f"{path} holds more than tensors, and loading it could run code; upcast reads state dicts only. "
            f"Save model.state_dict() instead. ({_first_line(error)})"
        ) from None
    except UpcastError:
        raise
    except Exception as error:  # what is no checkpoint fails in as many ways as an unpickler has opcodes
        raise UpcastError(
            f"{path} cannot be read, it may be truncated; it must be a whole file written by torch.save. "
            f"Download or convert it again. ({_first_line(error)})"
        ) from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    return checked(state, path)


def checked(state: object, path: Path) -> dict[str, Tensor]:
    """Return what a file held, if that is a state dict.

    Raises:
        UpcastError: it is anything else, or its tensors are larger than the file.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UpcastError(f"{path} is not a state dict: a dictionary of names and tensors. Save model.state_dict().")
    if not all(isinstance(name, str) for name in state):
        raise UpcastError(f"{path} is not a state dict: some of its names are no text. Save model.state_dict().")
    _check_room(state, path)
    overwriting.watch_what_was_read(path, state.values())
    return state


def _check_begin(path: Path) -> None:
    """Refuse what is neither an archive nor a pickle, such as a page or a pointer in place of what was not downloaded.

    An unpickler takes any text for orders, and those of most for dangerous ones.
    """
    with path.open("rb") as file:
        if not file.read(4).startswith((_ARCHIVE, b"\x80")):
            raise ValueError("it begins as no such file does")


def _check_archive(path: Path) -> None:
    """Refuse an archive whose entries share bytes: they would be read, and unpacked, once for each."""
    if _is_archive(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.compress_size for entry in archive.infolist()) > path.stat().st_size:
                raise UpcastError(f"{path}: its entries overlap; torch.save writes one after another. Save it again.")


def _check_room(state: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that come to more than the file has: a few bytes can say that they are a terabyte.

    Tied tensors count once. A part of one that is a tensor too is no reason, and a few small ones are none.
    """
    views = {(t.data_ptr(), t.shape, t.stride()): t for t in state.values() if t.layout == torch.strided}
    sizes = {name: numbers(tensor).nbytes for name, tensor in views.items() if not tensor.is_meta}
    if sum(sizes.values()) > 2 * _room(path) + _SMALL:
        largest = max(sizes, key=lambda view: sizes[view])
        raise UpcastError(
            f"{path}: tensors such as one of {tuple(largest[1])} repeat the same numbers, and together are larger than "
            "the file; a file holds its numbers once. Save contiguous copies."
        )


_ARCHIVE = b"PK\3\4"
_SMALL = 1 << 20
_DENSEST = 1032  # how many bytes one of a deflated entry can stand for


def _room(path: Path) -> int:
    """Return how many bytes of numbers a file can hold."""
    size = path.stat().st_size
    if _is_archive(path):
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        size += sum(min(entry.file_size, _DENSEST * entry.compress_size) for entry in packed)
    return size


def _load(path: Path) -> object:
    return torch.load(path, mmap=is_mappable(path), weights_only=True, map_location="cpu")


def is_mappable(path: Path) -> bool:
    """Whether the tensors lie in the file as they lie in memory: no entry of its archive is compressed.

    There is no archive in the format before torch 1.6. Asked to map compressed numbers, torch takes them as they are.
    """
    if not _is_archive(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _is_archive(path: Path) -> bool:
    """Whether torch takes a file for an archive: it looks at the first bytes, `zipfile` for four that end one.

    Of all files of numbers one in 65,000 has those four, by chance, where `zipfile` looks.
    """
    with path.open("rb") as file:
        return file.read(4) == _ARCHIVE and zipfile.is_zipfile(file)


def checksum(path: Path) -> int:
    """Return a checksum of those that an archive has of its entries; 0 where there are none."""
    try:
        if _is_archive(path):
            with zipfile.ZipFile(path) as archive:
                entries = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
            return zlib.crc32(repr(entries).encode())
    except OSError:
        raise
    except Exception:  # damaged archives fail in many ways, and are refused when they are read
        return 0
    return 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def to_float16(
    state: dict[str, Tensor], memory: Memory | None = None, keep: Sequence[str] = (), storage: str = "float16"
) -> Known:
    """Round the weights in ``state`` to float16, in place, one tensor at a time; leave those that will be packed.

    float16 tensors, vectors, what the patterns in ``keep`` name and what float16 cannot hold stay as they are, mapped.
    Returns, for each converted tensor, its original dtype and what rounding lost. The rounded numbers go to
    ``memory``, if there is one.
    """
    known: Known = {}
    with console.Progress(sum(tensor.nbytes for tensor in state.values()), "loading") as progress:
        _round(state, memory, keep, storage, known, progress)
    return known


def will_be_packed(tensor: Tensor, storage: str) -> bool:
    """Whether `upcast.patch` packs a mapped ``tensor`` under ``storage``; its pages are given back meanwhile."""
    if storage not in PACKING:
        return False
    found, _ = fitting(tensor, storage)
    give_back_pages(tensor)
    return found is not None


def _round(
    state: dict[str, Tensor],
    memory: Memory | None,
    keep: Sequence[str],
    storage: str,
    known: Known,
    progress: console.Progress,
) -> None:
    keep = (*keep, "*") if storage == "float32" else keep
    converted: dict[tuple[object, ...], tuple[Tensor, Rounding]] = {}
    for name, tensor in state.items():
        progress.advance(tensor.nbytes)
        if isinstance(tensor, PackedWeight):  # as its file holds it
            continue
        action, _ = decide(TensorRef(name, tensor, True, []), keep, False)
        key = (action, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.is_neg())  # tied tensors stay tied
        if action != CONVERT or will_be_packed(tensor, storage):
            if not is_plain(tensor):
                state[name], _ = converted.setdefault(key, (plain(tensor), Rounding()))
            continue
        if key not in converted:
            converted[key] = to_half(tensor, memory)
            give_back_pages(tensor)
        half, rounding = converted[key]
        if rounding.fits:
            state[name], known[name] = half, (tensor.dtype, rounding)

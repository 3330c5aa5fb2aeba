"""Checkpoints on their way to float16: mapped from the file, converted tensor by tensor, pages given back."""

import ctypes
import mmap
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from upcast.errors import UpcastError
from upcast.huge_pages import Memory
from upcast.planning import CONVERT, decide
from upcast.rounding import Rounding, to_half
from upcast.slot import Slot

Known = dict[str, tuple[torch.dtype, Rounding]]


def read(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a ``torch.save`` file, mapped into memory rather than read.

    Raises:
        UpcastError: the file is missing, truncated, or holds anything but tensors (nothing of it is executed).
    """
    if not path.is_file():
        raise UpcastError(f"no file {path}; a checkpoint folder holds one. Check the path, or download the model.")
    try:
        loaded = _load(path)
    except pickle.UnpicklingError as error:
        raise UpcastError(
            f"{path} holds more than tensors, and loading it could run code; upcast reads state dicts only. "
            f"Save model.state_dict() instead. ({_first_line(error)})"
        ) from None
    except Exception as error:  # what is no checkpoint fails in as many ways as an unpickler has opcodes
        raise UpcastError(
            f"{path} cannot be read, it may be truncated; it must be a whole file written by torch.save. "
            f"Download or convert it again. ({_first_line(error)})"
        ) from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UpcastError(f"{path} is not a state dict: a dictionary of names and tensors. Save model.state_dict().")
    return state


def _load(path: Path) -> object:
    try:
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except RuntimeError as error:
        if "_use_new_zipfile_serialization" not in str(error):
            raise
        return torch.load(path, weights_only=True, map_location="cpu")  # the format before torch 1.6


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def to_float16(state: dict[str, Tensor], memory: Memory | None = None, keep: Sequence[str] = ()) -> Known:
    """Round the weights in ``state`` to float16, in place, one tensor at a time.

    float16 tensors, vectors, what the patterns in ``keep`` name and what float16 cannot hold stay as they are, mapped.
    Returns, for each converted tensor, its original dtype and what rounding lost. The rounded numbers go to
    ``memory``, if there is one.
    """
    known: Known = {}
    converted: dict[tuple[object, ...], tuple[Tensor, Rounding]] = {}
    for name, tensor in state.items():
        action, _ = decide(Slot(name, tensor, True, []), keep, False)
        if action != CONVERT:
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # tied tensors stay tied
        if key not in converted:
            converted[key] = to_half(tensor, memory)
            give_back_pages(tensor)
        half, rounding = converted[key]
        if rounding.fits:
            state[name], known[name] = half, (tensor.dtype, rounding)
    return known


def give_back_pages(tensor: Tensor) -> None:
    """Tell the system that the mapped pages of ``tensor`` are no longer needed, or they count as ours to the end.

    Nothing happens to memory that no file backs: its numbers would be lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or tensor.numel() == 0:
        return
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + reach * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and _of_a_file(start, end):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _of_a_file(start: int, end: int) -> bool:
    """Whether one mapping of a file holds these addresses; True where the system does not say (not Linux)."""
    if not _MAPS.exists():
        return True
    for line in _MAPS.read_text().splitlines():
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        first, last = (int(edge, 16) for edge in span.split("-"))
        if first <= start < last:
            return end <= last and inode != "0"
    return False


_MAPS = Path("/proc/self/maps")

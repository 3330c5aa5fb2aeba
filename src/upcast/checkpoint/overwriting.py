"""Where the system gives no lease: this process's own writes to a file that a model is mapped from.

They are noticed when the file is opened. On Linux what is in use is copied first; elsewhere its memory cannot be
exchanged under a running model, and the write is refused before a byte is written. Other processes go unnoticed.
"""

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import wrapt
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from upcast.checkpoint import mapped
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import bounds
from upcast.kernels import held_files

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND
_watched: dict[tuple[int, int], list[tuple[StorageWeakRef, int, int]]] = {}  # device and inode -> what is in use


def watch(name: str, tensors: Sequence[Tensor]) -> None:
    """Notice who opens the file of this name for writing while one of ``tensors``, which are mapped from it, lives."""
    try:
        status = os.stat(name)
    except OSError:
        return  # deleted, or replaced
    places = [(StorageWeakRef(tensor.untyped_storage()), *bounds(tensor)) for tensor in tensors]
    key = (status.st_dev, status.st_ino)
    _watched[key] = [place for place in _watched.get(key, ()) if not place[0].expired()] + places
    _install()


def watch_what_was_read(name: str | Path, tensors: Iterable[Tensor]) -> None:
    """Take it that all of ``tensors`` are mapped from the file of this name, where the system does not say (macOS)."""
    if not mapped.is_listed():
        watch(str(name), [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.numel()])


@functools.cache
def _install() -> None:
    sys.addaudithook(_notice)
    # torch.save, and LitGPT beside it, open their files in C++, where no audit sees it.
    wrapt.wrap_function_wrapper(torch._C, "PyTorchFileWriter", _write)


def _notice(event: str, args: tuple[Any, ...]) -> None:
    if (event == "open" and args[2] & _WRITING) or event == "os.truncate":
        _about_to_write(args[0])


def _write(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    if args:
        _about_to_write(args[0])
    return wrapped(*args, **kwargs)


def _about_to_write(path: object) -> None:
    """Make the numbers that a model has in this file its own; refuse where that cannot be."""
    if not _watched or not isinstance(path, (str, bytes, os.PathLike)):
        return
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return  # a new file, or one that cannot be opened
    for reference, start, end in _watched.get((status.st_dev, status.st_ino), ()):
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)  # it stays for as long as it is copied
        if storage is not None and not held_files.own(start, end):
            raise UpcastError(
                f"{os.fsdecode(path)} holds weights of a model that is in use, and writing to it would change or end "
                "them; nothing is written. Write to another name beside it, and then os.replace it."
            )
    _watched.pop((status.st_dev, status.st_ino), None)


def hold(root: nn.Module) -> None:
    """Have what happens to files not reach the tensors of ``root`` that are mapped from them."""
    for name, tensors in mapped.hold(root):
        watch(name, tensors)

"""One run at a time: a lock file beside what is written, which goes when its holder ends.

A file, because network file systems lock only what is open for writing, and a folder never is. A holder that is killed
leaves an empty file without a lock: the next one takes it over.
"""

import errno
import importlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from upcast.core.errors import UpcastError

_fcntl: Any
try:
    _fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    _fcntl = None
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_CLOSING_DELETES = getattr(os, "O_TEMPORARY", 0)  # Windows deletes no open file, but closes such a one by deleting it
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _CLOSING_DELETES


@contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path`` within the block.

    Raises:
        UpcastError: another run holds it (``busy`` says what that means), or a file of that name is not a lock.
        OSError: it cannot be made, or the file system has no locks.
    """
    while True:
        with _opened(path) as file:
            _take(file, path, busy)
            if not _is_named(path, file):
                continue  # its holder deleted it after we had opened it
            try:
                yield
            finally:
                if not _CLOSING_DELETES and _is_named(path, file):
                    path.unlink()
            return


def _opened(path: Path) -> BinaryIO:
    try:
        file = os.fdopen(os.open(path, _FLAGS, 0o600), "r+b", buffering=0)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UpcastError(f"{path} is a link; the lock file of that name must be one. Move it away.") from None
    found = os.fstat(file.fileno())
    if found.st_size or not stat.S_ISREG(found.st_mode):
        file.close()
        raise UpcastError(f"{path} is not upcast's: its lock file of that name is empty. Move it away.")
    return file


def _take(file: BinaryIO, path: Path, busy: str) -> None:
    try:
        if _fcntl is not None:
            _fcntl.flock(file, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        else:
            msvcrt: Any = importlib.import_module("msvcrt")
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in _TAKEN:
            raise UpcastError(busy) from None
        raise OSError(error.errno, f"it cannot be locked ({error.strerror})", str(path)) from None


def _is_named(path: Path, file: BinaryIO) -> bool:
    """Whether ``path`` is still the file that is open."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

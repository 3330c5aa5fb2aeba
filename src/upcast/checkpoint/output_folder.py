"""The folder that a conversion grows in: one run's at a time, ours alone, and resumable wherever the run is stopped.

``OUTPUT.partial`` is ours when it carries our plan or our manifest. Whatever else is found in it is somebody's, and is
neither written nor deleted. Small files appear whole or not at all; what the plan says is on the disk before what it
allows; and the rename to ``OUTPUT`` comes last.
"""

import errno
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upcast.core import file_lock
from upcast.core.errors import UpcastError

WEIGHTS, MANIFEST, PLAN, JOURNAL = "lit_model.pth", "upcast.json", "upcast.plan.json", "upcast.journal"
LAYING_OUT, FRESH = "lit_model.new", "upcast.new"  # what becomes the weights' file, and any other, when it is whole
OWN = (WEIGHTS, MANIFEST, PLAN, JOURNAL, LAYING_OUT, FRESH)
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


class Partial:
    """``OUTPUT.partial``, and what a run has written to it so far.

    Attributes:
        output: the name that it takes in the end.
        folder: where it grows.
        needed: the bytes of the whole of it, as far as known.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output.parent / f"{output.name}.partial"
        self.lock = output.parent / f"{output.name}.partial.lock"
        self.journal = self.folder / JOURNAL
        self.needed = 0

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """Within the block, what the system refuses becomes one error: what is missing, and how to go on."""
        try:
            yield
        except OSError as error:
            raise UpcastError(self._explained(error)) from None

    def _explained(self, error: OSError) -> str:
        on = "The checkpoint is untouched, and the same command goes on from here."
        if error.errno not in _FULL:
            return (
                f"{error.filename or self.folder}: {error.strerror or error}; {self.folder} must be writable, and the "
                f"checkpoint readable. See to it, or name another folder with --output. {on}"
            )
        where = next(folder for folder in self.folder.parents if folder.is_dir())
        free, more = shutil.disk_usage(where).free, self.needed - self.bytes_held()
        missing = f"{more - free:,} bytes are missing." if more > free else f"{free:,} are free: a quota or limit?"
        return (
            f"the copy needs {max(more, 0):,} bytes more, and {where} has no room for it ({error.strerror}): "
            f"{missing} Free some space, or name a folder elsewhere with --output. {on}"
        )

    def bytes_held(self) -> int:
        """Return how much of the disk our files take up already."""
        found = [(self.folder / name).lstat() for name in self.names()]
        return sum(512 * each.st_blocks if hasattr(each, "st_blocks") else each.st_size for each in found)

    # --- whose it is --------------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder's name for this run.

        Raises:
            UpcastError: another run holds it, or what stands there is not ours.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock.held(self.lock, f"another process is writing {self.folder}; one at a time may."):
            self._check_ours()
            yield

    def _check_ours(self) -> None:
        """Refuse a link, a file, and a folder with anything in it that convert did not write."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            kind = "a link" if self.folder.is_symlink() else "not a folder"
            raise UpcastError(f"{self.folder} is {kind}; convert grows a copy in a folder there. {_MOVE}")
        names, known = self.names(), {FRESH}
        for mark in map(self.read, (PLAN, MANIFEST)):
            if "upcast" in mark and "source" in mark and isinstance(mark.get("beside"), list):
                weights = mark.get("weights")
                known.update(OWN, map(str, mark["beside"]), map(str, weights if isinstance(weights, list) else ()))
        foreign = [name for name in names if name not in known or not _is_plain_file(self.folder / name)]
        if foreign:
            listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UpcastError(
                f"{self.folder} holds what convert did not write, or cannot tell to be its own ({listed}); it is left "
                f"as it is. {_MOVE}"
            )

    def names(self) -> list[str]:
        """Return what is in the folder, if there is one."""
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []

    # --- what is in it ------------------------------------------------------------------------------------------------

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file; an empty one where there is none that can be read."""
        return read_json(self.folder / name)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file that is there whole or not at all, also after a loss of power."""
        with self.appearing(name) as fresh, fresh.open("w") as file:
            file.write(json.dumps(content, indent=1) + "\n")

    def put(self, name: str, content: bytes, like: Path) -> None:
        """Write a file beside the weights, with the times and mode of ``like``."""
        with self.appearing(name, like=like) as fresh:
            fresh.write_bytes(content)

    def copy(self, source: Path) -> None:
        """Copy a file beside the weights, with its times and mode; one that is there, read-only or not, is replaced."""
        with self.appearing(source.name, like=source) as fresh:
            shutil.copyfile(source, fresh)

    @contextmanager
    def appearing(self, name: str, temporary: str = FRESH, like: Path | None = None) -> Iterator[Path]:
        """Give the path of a temporary file; it takes its name when the block has ended and the disk has it."""
        fresh = self.folder / temporary
        fresh.unlink(missing_ok=True)
        yield fresh
        with fresh.open("r+b") as file:
            if like is not None:
                shutil.copystat(like, fresh)
            os.fsync(file.fileno())
        fresh.replace(self.folder / name)
        _sync_folder(self.folder)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return name -> entry of the journal, which then holds nothing else; a damaged line counts for nothing."""
        text = self.journal.read_bytes().decode(errors="replace") if self.journal.is_file() else ""
        done = {entry["name"]: entry for entry in map(_entry, text.splitlines()) if entry}
        with self.appearing(JOURNAL) as fresh:
            fresh.write_text("".join(map(journal_line, done.values())))
        return done

    # --- how it comes and goes ----------------------------------------------------------------------------------------

    def begin(self, plan: dict[str, Any]) -> None:
        """Make the folder, or empty it of what another run left, and write ``plan``: from here on it is ours.

        Only its owner gets in while it grows; the plan of that other run goes last.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        set_mode(self.folder, 0o700)
        _sync_folder(self.folder.parent)
        self.delete(set(self.names()) - {PLAN, MANIFEST})
        self.write(PLAN, plan)
        self.delete([MANIFEST])
        _sync_folder(self.folder)

    def clear(self) -> None:
        """Delete what convert wrote, and the folder; what tells that it is ours goes last."""
        if self.folder.is_dir():
            self.delete(set(self.names()) - {PLAN, MANIFEST})  # nothing foreign is among them: `alone` has looked
            self.delete([MANIFEST, PLAN])
            self.folder.rmdir()

    def delete(self, names: Iterable[str]) -> None:
        """Delete files of ours, those that are there."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def finish(self, like: Path, weights: Path) -> None:
        """Give the folder its final name and the permissions of ``like``; the manifest must have been written.

        weights: the file from whose permissions the manifest gets its own.
        """
        self.delete((JOURNAL, FRESH, LAYING_OUT, PLAN))
        set_mode(self.folder / MANIFEST, weights.stat().st_mode & 0o666)
        set_mode(self.folder, (self.output if self.output.is_dir() else like).stat().st_mode | 0o700)
        _sync_folder(self.folder)
        if os.name == "nt" and self.output.is_dir():  # elsewhere a rename replaces an empty folder
            self.output.rmdir()
        self.folder.rename(self.output)
        _sync_folder(self.output.parent)


_MOVE = "Move it away, or name another folder with --output."


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty one where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes()) if _is_plain_file(path) else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def journal_line(entry: dict[str, Any]) -> str:
    """Return a line of the journal: the entry and its checksum, so that a damaged one is told from a whole one."""
    text = json.dumps(entry)
    return f"{text} {zlib.crc32(text.encode()):08x}\n"


def _entry(line: str) -> dict[str, Any] | None:
    text, _, crc = line.rpartition(" ")
    if crc != f"{zlib.crc32(text.encode()):08x}":
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("name"), str) else None


def set_mode(path: Path, mode: int) -> None:
    """Give a file or folder its permissions, where there are any."""
    with suppress(PermissionError):  # a file system without modes
        path.chmod(stat.S_IMODE(mode))


def _is_plain_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _sync_folder(path: Path) -> None:
    """Have the disk know the names in a folder, where the system opens folders (Windows does not)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(handle)

"""Small text files that users hand over: policies, configs, indices."""

import stat
from pathlib import Path

from upcast.core.errors import UpcastError


def read(path: Path, kind: str, limit: int) -> str:
    """Return the text of an ordinary file of at most ``limit`` bytes.

    Args:
        path: the file.
        kind: what it is, for the error.
        limit: more is refused unread; pipes and devices, which may have no end, always are.

    Raises:
        UpcastError: it is missing, no ordinary file, too large, or no UTF-8.
    """
    name = str(path)
    shown = name if name.isprintable() and len(name) <= 300 else f"{name[:300]!r}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UpcastError(f"{kind} {shown} is no ordinary file; it must be one. Check the path.")
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UpcastError(f"{kind} {shown} has more than {limit:,} bytes; no such file has. Check the path.")
        return content.decode()
    except UpcastError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no system takes
        why = error.strerror if isinstance(error, OSError) else error
        raise UpcastError(f"{kind} {shown}: {why}; it must be a readable text file. Check the path.") from None

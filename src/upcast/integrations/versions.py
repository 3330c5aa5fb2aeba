"""Which version of a library is there, and whether upcast has been run with it.

What upcast uses of a library's insides stands in one table per library (`litgpt.versions`, `transformers.versions`;
torch's is `upcast.core.torch_private`). What an installed version does not have, or what is newer than the last one
that was run, costs the fused forwards; the model computes the same without them.
"""

import functools
import re
from importlib import metadata

Version = tuple[int, ...]


@functools.cache
def installed(library: str) -> Version:
    """Return the numbers of the library's version; () where nobody knows it."""
    try:
        return numbers(metadata.version(library))
    except metadata.PackageNotFoundError:
        return ()


def numbers(version: str) -> Version:
    """Return the release of a version: (5, 0, 2) of 5.0.2rc1+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def newer(library: str, newest: str) -> str:
    """Return why nothing of this version of ``library`` is fused, or an empty string: ``newest`` is the last one run.

    A version of fewer numbers stands for all that begin so: "5.24" for 5.24.1.
    """
    have, known = installed(library), numbers(newest)
    if have[: len(known)] <= known:
        return ""
    return f"{library} {'.'.join(map(str, have))} is newer than {newest}, the last one that upcast was run with"

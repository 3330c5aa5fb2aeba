"""How this processor reads weights best: what upcast's table says, or what ``python -m upcast tune`` measured here.

The table (csrc/runtime/tuning.cpp) has a row per family of processors. What was measured stands in a file of the
user's, by processor and instruction set, and counts from the next process on. A file that cannot be read costs nothing
but itself. No reading changes a bit of a result.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

from upcast.core import messages
from upcast.core.config import OFF
from upcast.core.errors import UpcastError
from upcast.kernels import native_library

READINGS = ("one_stream", "near_streams", "far_streams")
"""How rows of weights come from memory: one after the other, several neighbours at once, or several far apart."""

_VERSION = 1
_loaded: Path | None = None  # the file that what the kernels go by is from


class Tuning(NamedTuple):
    """What is chosen per processor: how weights are read, and from how many rows of x on torch's product is faster."""

    reading: str
    torch_rows: int  # 0: never


def in_use() -> Tuning:
    """Return what the kernels go by, at the level in use."""
    reading, rows = native_library.native.tuning()
    return Tuning(READINGS[reading], rows)


def use(tuning: Tuning | None) -> None:
    """Have the kernels go by ``tuning`` at the level in use, or by upcast's table.

    Raises:
        UpcastError: a reading that is none, or a number of rows that is none.
    """
    if tuning is not None and tuning.reading not in READINGS:
        raise UpcastError(
            f"reading {tuning.reading!r}; it must be one of {', '.join(READINGS)}. Run upcast tune again."
        )
    global _loaded  # noqa: PLW0603 - one choice per process
    _loaded = None
    reading = None if tuning is None else READINGS.index(tuning.reading)
    native_library.native.tune(reading, 0 if tuning is None else tuning.torch_rows)
    native_library.torch_rows = in_use().torch_rows


def path() -> Path | None:
    """Return where what was measured is kept, UPCAST_TUNING or a file in the user's cache; None if that says off."""
    named = os.environ.get("UPCAST_TUNING", "").strip()
    if named:
        return None if named.lower() in OFF else Path(named).expanduser()
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "upcast" / "tuning.json"


def load() -> None:
    """Go by what was measured of this processor at the level in use, if anything was; a bad file is said once."""
    global _loaded  # noqa: PLW0603
    try:
        file = path()
        found = None if file is None or not file.is_file() else _entry(json.loads(file.read_text()))
        if found is not None:
            use(Tuning(str(found["reading"]), int(found["torch_rows"])))
            _loaded = file
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: there is no home
        use(None)
        messages.say(f"what upcast tune measured is left out: {error}. Run it again, or set UPCAST_TUNING=off.")


def save(tuning: Tuning, figures: dict[str, Any]) -> Path:
    """Keep ``tuning`` for this processor at the level in use, beside what was measured; return the file.

    Raises:
        UpcastError: UPCAST_TUNING says off, or the file cannot be written.
    """
    file = path()
    if file is None:
        raise UpcastError("UPCAST_TUNING is off; it says where to keep what is measured. Unset it, or name a file.")
    known = _known(file)
    known.setdefault(processor(), {})[native_library.level()] = {**tuning._asdict(), **figures}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps({"version": _VERSION, "processors": known}, indent=1) + "\n")
        new.replace(file)  # whole or not at all
    except OSError as error:
        raise UpcastError(f"cannot write {file} ({error}); set UPCAST_TUNING to a file that can be.") from error
    return file


def describe() -> str:
    """Return in words what the kernels go by, and where that is from."""
    if not native_library.available():
        return "none: portable kernels"
    reading, rows = in_use()
    products = f", torch's products from {rows} rows on" if rows else ""
    source = "upcast's table" if _loaded is None else f"measured, {_loaded}"
    return f"{reading}{products} ({source})"


def processor() -> str:
    """Return the processor's name, with what tells its generation where the name does not (virtual machines)."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.partition(":") for line in cpuinfo.read_text().partition("\n\n")[0].splitlines()]
        fields = {name.strip(): value.strip() for name, _, value in lines}
    kinds = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    return " ".join([f"{kind} {fields[kind]}" for kind in kinds if kind in fields]) or platform.processor()


def _known(file: Path) -> dict[str, Any]:
    """Return processor -> level -> what was measured; nothing of a file that is none of ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    known = found.get("processors") if isinstance(found, dict) and found.get("version") == _VERSION else None
    return known if isinstance(known, dict) else {}


def _entry(found: Any) -> dict[str, Any] | None:
    """Return what the content of a file says of this processor at the level in use.

    Raises:
        ValueError: it is not of this version.
        TypeError: something in it is no mapping.
    """
    if not isinstance(found, dict) or found.get("version") != _VERSION:
        raise ValueError(f"it has no version {_VERSION}")
    for key in ("processors", processor(), native_library.level()):
        if not isinstance(found, dict):
            raise TypeError(f"what it says of {key!r} is no mapping")
        if key not in found:
            return None
        found = found[key]
    if not isinstance(found, dict):
        raise TypeError(f"what it says is {found!r}")
    return found

"""The files of a Transformers checkpoint: that they lie in its folder, and which of them cannot be read."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from upcast.core import text_file
from upcast.core.errors import UpcastError, describe

LARGEST = 1 << 28  # bytes of an index; that of 700 billion parameters has 9 million
_SAVED = "it must be as its library wrote it. Download or save the checkpoint again."
_KNOWN = "its library must know what it is. Update the library, or download or save the checkpoint again."


def check_inside(settings: Any) -> None:
    """Raise UpcastError where a checkpoint's index names files outside its folder.

    It is the name that counts: a cache keeps links to files that lie elsewhere.
    """
    index: Any = getattr(settings, "sharded_metadata", None) or {}
    for name in dict.fromkeys(index.get("weight_map", {}).values()):
        if not _is_inside(name):
            raise UpcastError(f"{_index_of(settings)}: {_outside(name)}")


def check_folder(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """The same, for loaders of which upcast does not see what they have read: every index of a local folder."""
    folder = _folder(args, kwargs)
    for path in [] if folder is None else sorted(folder.glob("*.index.json")):
        try:
            content = json.loads(text_file.read(path, "index", LARGEST))
        except (ValueError, RecursionError):
            continue  # the library may not want it, or says so
        entries = content.get("weight_map") if isinstance(content, dict) else None
        for name in entries.values() if isinstance(entries, dict) else ():
            if not _is_inside(name):
                raise UpcastError(f"{path}: {_outside(name)}")


def _folder(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Path | None:
    """Return the local folder that a call of ``from_pretrained`` names."""
    given = (*args, *(kwargs.get(name) for name in ("pretrained_model_name_or_path", "model_id")))
    found = (each for each in given if isinstance(each, (str, Path)) and os.path.isdir(each))
    return next((Path(each, kwargs.get("subfolder") or "") for each in found), None)


def _is_inside(name: object) -> bool:
    if not isinstance(name, str):
        return False
    both = PurePosixPath(name), PureWindowsPath(name)
    return "\0" not in name and not any(path.anchor or ".." in path.parts for path in both)


def _outside(name: object) -> str:
    return f"it names {str(name)[:200]!r}; the files of a checkpoint lie in its folder. Do not trust it."


def _index_of(settings: Any) -> Path:
    folder = Path(str(getattr(settings, "pretrained_model_name_or_path", "")))
    return next(folder.glob("*.index.json"), folder / "model.safetensors.index.json")


@contextmanager
def read_from(file: str | Path) -> Iterator[None]:
    """Have what goes wrong within the block say which file it was."""
    try:
        yield
    except UpcastError:
        raise
    except Exception as error:
        raise UpcastError(f"{file} cannot be read ({describe(error)}); {_SAVED}") from None


@contextmanager
def loaded_from(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Have what the library cannot load from a local folder say which file it was."""
    folder = _folder(args, kwargs)
    try:
        yield
    except UpcastError:
        raise
    except Exception as error:
        if folder is None:
            raise
        culprit = _broken(folder)
        if culprit is None and str(folder) in str(error):
            raise
        if culprit:
            raise UpcastError(f"{culprit}; {_SAVED}") from error
        named = f"{folder}: config.json" if (folder / "config.json").exists() else f"{folder}"
        raise UpcastError(f"{named} and what lies beside it cannot be loaded ({describe(error)}); {_KNOWN}") from error


def _broken(folder: Path) -> str | None:
    """Return what is wrong with the first of the folder's JSON files that cannot be read."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(text_file.read(path, "file", LARGEST))
        except UpcastError as error:
            return str(error).partition(";")[0]
        except (ValueError, RecursionError) as error:
            return f"{path} is no JSON ({describe(error)})"
        why = _no_index(content) if path.name.endswith(".index.json") else ""
        if why or (path.name == "config.json" and not isinstance(content, dict)):
            return f"{path} is {why or 'no config'}"
    return None


def _no_index(content: Any) -> str:
    entries = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not isinstance(content.get("metadata"), dict):
        return "no index: it has no entries 'metadata' and 'weight_map'"
    odd = next((name for name in entries.values() if not _is_inside(name)), None)
    return "" if odd is None else f"no index: it names {str(odd)[:200]!r}"

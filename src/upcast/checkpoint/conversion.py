"""A converted copy of a checkpoint folder, written tensor by tensor: what all conversions have in common.

The copy grows in ``OUTPUT.partial`` (`output_folder`): the weights' files are laid out first, then filled in place,
with a journal of what is done, so that an interrupted conversion goes on where it was. It takes its final name when
what was written has been read back. What becomes of each tensor, and what a file of the copy is, a `Conversion` says.
"""

import errno
import filecmp
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from upcast.checkpoint import extents
from upcast.checkpoint.conversion_kind import Conversion, Folders, Item
from upcast.checkpoint.extents import Extent
from upcast.checkpoint.output_folder import LAYING_OUT, MANIFEST, OWN, PLAN, WEIGHTS, journal_line, read_json, set_mode
from upcast.core import console, messages, pages
from upcast.core.errors import UpcastError

ROW = 1000  # bytes of the disk for what is noted about a tensor: in the plan, the journal, the manifest and the file
BLOCK = 4096  # bytes of the disk that a file may take beyond its own


def run(conversion: Conversion) -> str:
    """Write the copy, or the rest of it, and return the report."""
    source, partial = conversion.source, conversion.partial
    progress = console.Progress(conversion.work())
    try:
        rows = _whole(conversion)
        if rows is None:
            planned = _planned(conversion, progress)
            items = planned or conversion.survey(progress)
            nothing = conversion.nothing(items)
            if nothing:
                partial.clear()
                return nothing
            _lay_out(conversion, items, goes_on=planned is not None)
            rows = _fill(conversion, items, progress)
            _verify(conversion, progress)
            _gather(conversion, items, rows)
        else:
            _verify(conversion, progress)
        partial.finish(source.folder, source.first)
    finally:
        progress.close()
    with suppress(OSError):  # the copy stands; this makes it faster
        for name in conversion.outputs:
            pages.advise(partial.output / name)
    conversion.say(rows)
    return conversion.report(rows)


# --- refusals ---------------------------------------------------------------------------------------------------------


def followed(output: Path) -> Path:
    """Return where the links in ``output`` lead."""
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UpcastError(f"{str(output)!r} leads nowhere ({error}). Name another folder with --output.") from None


def already(folder: Path, output: Path, kind: str, folders: Folders, is_whole: Callable[[Path], bool]) -> str | None:
    """Return what to say when ``output`` is the copy; refuse it when it is the checkpoint itself, or taken.

    ``is_whole``: whether a file of weights can be read.
    """
    if output == folder:
        raise UpcastError(
            f"the output {output} is the checkpoint itself; nothing is overwritten. Name another folder with --output."
        )
    found = read_json(output / MANIFEST)
    names = found.get("weights", [WEIGHTS])  # manifests of 0.1 say neither this nor the kind
    same = found.get("kind", "a float16 copy") == kind and found.get("source") == folders.identity(folder)
    if same and isinstance(names, list) and all(isinstance(name, str) and is_whole(output / name) for name in names):
        others = [path.name for path in folders.beside(folder) if not _is_same(path, output / path.name)]
        but = f". Not as in the checkpoint: {', '.join(others)}" if others else ""
        return f"{output} is there already, converted from this checkpoint: nothing to do{but}"
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UpcastError(
            f"{output} is there already, and is not {kind} of this checkpoint as it is now; nothing is "
            "overwritten. Delete it, or name another folder with --output."
        )
    if os.path.ismount(output):
        raise UpcastError(
            f"{output} is a mount point, and the copy could not take its name in the end. Name another folder with "
            f"--output, such as {output / folder.name}-copy."
        )
    return None


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


# --- what an earlier run left -----------------------------------------------------------------------------------------


def _whole(conversion: Conversion) -> list[dict[str, Any]] | None:
    """Return what was done, if a run was stopped after the manifest: only the final name is missing then."""
    content = conversion.partial.read(MANIFEST)
    if not conversion.is_of(content):
        return None
    try:
        rows = {row["name"]: row for row in content["tensors"]}
        found = [rows[name] for name in conversion.source.weights]
        conversion.report(found)
    except (KeyError, TypeError, ValueError):
        return None
    return found if all(conversion.is_whole(conversion.partial.folder / name) for name in conversion.outputs) else None


def _planned(conversion: Conversion, progress: console.Progress) -> list[Item] | None:
    """Return the items of an interrupted conversion of this source, if there is one."""
    content, weights = conversion.partial.read(PLAN), conversion.source.weights
    if not conversion.is_of(content):
        return None
    try:
        items = [Item(**row) for row in content["tensors"]]
        if [item.name for item in items] != list(weights) or not conversion.is_sound(items):
            return None
    except (KeyError, TypeError):
        return None
    progress.phase("resuming")
    progress.advance(sum(tensor.nbytes for tensor in weights.values()))
    return items


def _plan(conversion: Conversion, items: Sequence[Item]) -> dict[str, Any]:
    return {**conversion.mark, "tensors": [asdict(item) for item in items]}


# --- the steps --------------------------------------------------------------------------------------------------------


def _lay_out(conversion: Conversion, items: Sequence[Item], goes_on: bool) -> None:
    """Note what is to be done, and make the new files with room for all of it; or find both there."""
    partial, source = conversion.partial, conversion.source
    parts = {name: conversion.of_file(name, items) for name in conversion.outputs}
    states = {name: conversion.outlines(name, part) for name, part in parts.items()}
    stored = {(name, id(each)): each.nbytes for name, state in states.items() for each in state.values()}
    files = [sum(stored.values()), *(path.stat().st_size for path in conversion.folders.beside(source.folder))]
    partial.needed = sum(size + BLOCK for size in [*files, *[0] * len(OWN)]) + ROW * len(items)
    if goes_on and all(
        conversion.places(partial.folder / name, name, state, parts[name]) is not None for name, state in states.items()
    ):
        return
    try:
        partial.begin(_plan(conversion, items))
        if shutil.disk_usage(partial.folder).free + partial.bytes_held() < partial.needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, state in states.items():
            with partial.appearing(name, LAYING_OUT) as fresh:
                conversion.lay_out(fresh, name, state, parts[name])
                set_mode(fresh, (source.folder / conversion.outputs[name]).stat().st_mode | 0o600)
    except OSError:
        partial.clear()
        raise


def _fill(conversion: Conversion, items: Sequence[Item], progress: console.Progress) -> list[dict[str, Any]]:
    """Write every tensor that the journal does not know, and the checksums; return what is to be said of each.

    What the journal knows is compared with the file: after a loss of power it may say more than the disk holds.
    """
    partial = conversion.partial
    known = {name: entry for name, entry in partial.entries().items() if conversion.is_entry(entry)}
    if known:
        messages.say(f"going on with {partial.folder.name}: {len(known)} of {len(items)} tensors are written")
    progress.phase("converting")
    written: dict[str, dict[str, Any]] = {}
    with partial.journal.open("a") as journal:
        for name in conversion.outputs:
            _fill_file(conversion, name, conversion.of_file(name, items), known, written, journal, progress)
    found = []
    for item in items:
        entry = written[item.alias or item.name]
        found.append(conversion.row(item, entry, None if item.alias else f"{entry['crc32']:08x}"))
    return found


def _fill_file(
    conversion: Conversion,
    name: str,
    items: Mapping[str, Item],
    known: Mapping[str, dict[str, Any]],
    written: dict[str, dict[str, Any]],
    journal: Any,
    progress: console.Progress,
) -> None:
    path, checksums = conversion.partial.folder / name, []
    places = iter(conversion.places(path, name, conversion.outlines(name, items), items) or ())
    with path.open("r+b") as file:
        for item in items.values():
            if item.alias is None:
                place, entry = next(places), known.get(item.name)
                if entry is None or entry["crc32"] != extents.checksum(file, place):
                    entry = _write_tensor(conversion, item, file, place)
                    journal.write(journal_line(entry))
                    journal.flush()
                written[item.name] = entry
                checksums.append(entry["crc32"])
            progress.advance(conversion.source.weights[item.name].nbytes)
    conversion.seal(path, checksums)


def _write_tensor(conversion: Conversion, item: Item, file: BinaryIO, place: Extent) -> dict[str, Any]:
    return conversion.write(item, file, place)


def _verify(conversion: Conversion, progress: console.Progress) -> None:
    progress.phase("verifying")
    try:
        for name in conversion.outputs:
            conversion.verify(conversion.partial.folder / name, name, progress)
    except OSError:
        raise
    except Exception as error:  # damaged files fail in many ways
        conversion.partial.clear()
        raise UpcastError(
            f"what was read back is not what was written ({error}); a copy must be whole. Check the disk, and convert "
            "again: the broken file is deleted."
        ) from None


def _gather(conversion: Conversion, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> None:
    """Copy the other files, and write the manifest: from here on the copy is whole."""
    partial, source, folders = conversion.partial, conversion.source, conversion.folders
    if folders.identity(source.folder) != source.identity:
        partial.clear()
        raise UpcastError(f"{source.first} changed while it was converted; it must stay as it is. Convert again.")
    others, changed = folders.beside(source.folder), folders.written(source.folder)
    names, there = {*(path.name for path in others), *changed}, set(partial.names()) - {*OWN, *conversion.outputs}
    if not names <= set(partial.read(PLAN).get("beside", ())):  # what is ours is in the plan before it is in the folder
        partial.write(PLAN, {**_plan(conversion, items), "beside": sorted(names | there)})
    partial.delete(there - names)
    for path in others:
        partial.copy(path)
    for name, content in changed.items():
        partial.put(name, content, source.folder / name)
    partial.write(MANIFEST, {**conversion.mark, "tensors": list(rows)})

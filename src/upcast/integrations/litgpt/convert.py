"""``python -m upcast convert``: a float16 copy of a LitGPT checkpoint, written tensor by tensor.

The copy grows in ``OUTPUT.partial`` (`upcast.checkpoint.output_folder`): the weights' file is laid out first, then
filled in place, with a journal of what is done, so that an interrupted conversion goes on where it was. It takes its
final name when every checksum has been read back. What is rounded and what is not is decided by `upcast.patching.plan`,
as for a model in memory.
"""

import errno
import filecmp
import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from upcast.checkpoint import reading, zip_writer
from upcast.checkpoint.output_folder import (
    LAYING_OUT,
    MANIFEST,
    OWN,
    PLAN,
    WEIGHTS,
    Partial,
    journal_line,
    read_json,
    set_mode,
)
from upcast.core import console, messages, pages
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import memory, plain
from upcast.core.pages import give_back_pages
from upcast.core.tensor_ref import TensorRef
from upcast.integrations.litgpt.convert_source import Source, beside, checkpoint_folder, identity_of
from upcast.kernels.rounding import Rounding, write_half
from upcast.patching.plan import CONVERT, IN_FLOAT16, KEEP, UPCAST, Change, Plan, change_of, decisions

ROW = 1000  # bytes of the disk for what is noted about a tensor: in the plan, the journal, the manifest and the archive
BLOCK = 4096  # bytes of the disk that a file may take beyond its own


@dataclass(frozen=True)
class Item:
    """One tensor of the checkpoint and what becomes of it; ``alias`` names an earlier tensor with the same numbers."""

    name: str
    action: str
    reason: str
    alias: str | None


def convert(folder: Path, output: Path | None = None) -> str:
    """Write a float16 copy of the LitGPT checkpoint in ``folder`` and return a report to print.

    Weights are rounded to nearest float16; vectors and what float16 cannot hold are stored in float32. The files
    beside the weights (config, tokenizer) are copied. Interrupted, it is resumed by the same call.

    Args:
        folder: holds ``model_config.yaml`` and ``lit_model.pth`` in any floating dtype.
        output: the new folder; by default ``folder`` with ``-float16`` after its name.

    Raises:
        UpcastError: nothing to read, no space, or ``output`` is there already or being written by another process.
            Nothing has appeared under the name ``output`` then.
    """
    folder = checkpoint_folder(folder)
    partial = Partial(_followed(folder.with_name(f"{folder.name}-float16") if output is None else output))
    with partial.errors_told():
        done = None if partial.lock.exists() else _already(folder, partial.output)
        if done is not None:
            return done
        source = Source.read(folder)
        if source.is_float16 and source.is_usable:
            return _nothing(folder, True)
        partial.needed = sum(2 * tensor.numel() for tensor in source.weights.values())  # the survey will know better
        with partial.alone():  # and ask again: the run before this one may have ended meanwhile
            return _already(folder, partial.output) or _twin(source, partial)


def _twin(source: Source, partial: Partial) -> str:
    """Write the copy, or the rest of it, and return the report."""
    progress = console.Progress(_work(source.weights))
    try:
        changes = _whole(partial, source)
        if changes is None:
            planned = _planned(partial, source, progress)
            items = planned or _survey(source, progress)
            halves = any(item.action in IN_FLOAT16 for item in items)
            if not any(item.action == CONVERT for item in items) and (not halves or source.is_usable):
                partial.clear()
                return _nothing(source.folder, halves)
            _lay_out(partial, source, items, goes_on=planned is not None)
            changes = _fill(partial, source, items, progress)
            _verify(partial, source, progress)
            _gather(partial, source, items, changes)
        else:
            _verify(partial, source, progress)
        partial.finish(source.folder)
    finally:
        progress.close()
    with suppress(OSError):  # the copy stands; this makes it faster
        pages.advise(partial.output / WEIGHTS)
    plan = Plan(source.folder.name, tuple(changes))
    messages.say(f"converted {source.folder.name}", plan)
    return _report(plan, partial.output)


def _nothing(folder: Path, halves: bool) -> str:
    if halves:
        return f"{folder} is float16 already: nothing to convert, it is mapped and shared as it is"
    return f"{folder} has no weight that float16 can hold: nothing to convert"


def _work(weights: dict[str, Tensor]) -> int:
    """Return the bytes to go through: the source twice, and the new file about once."""
    return sum(2 * tensor.nbytes + 2 * tensor.numel() for tensor in weights.values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def _followed(output: Path) -> Path:
    """Return where the links in ``output`` lead."""
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UpcastError(f"{str(output)!r} leads nowhere ({error}). Name another folder with --output.") from None


def _already(folder: Path, output: Path) -> str | None:
    """Return what to say when ``output`` is the copy; refuse it when it is the checkpoint itself, or taken."""
    if output == folder:
        raise UpcastError(
            f"the output {output} is the checkpoint itself; nothing is overwritten. Name another folder with --output."
        )
    if read_json(output / MANIFEST).get("source") == identity_of(folder) and zipfile.is_zipfile(output / WEIGHTS):
        others = [path.name for path in beside(folder) if not _is_same(path, output / path.name)]
        but = f". Not as in the checkpoint: {', '.join(others)}" if others else ""
        return f"{output} is there already, converted from this checkpoint: nothing to do{but}"
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UpcastError(
            f"{output} is there already, and is not a float16 copy of this checkpoint as it is now; nothing is "
            "overwritten. Delete it, or name another folder with --output."
        )
    if os.path.ismount(output):
        raise UpcastError(
            f"{output} is a mount point, and the copy could not take its name in the end. Name another folder with "
            f"--output, such as {output / folder.name}-float16."
        )
    return None


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


# --- what an earlier run left -----------------------------------------------------------------------------------------


def _whole(partial: Partial, source: Source) -> list[Change] | None:
    """Return what was done, if a run was stopped after the manifest: only the final name is missing then."""
    content = partial.read(MANIFEST)
    if not source.is_of(content) or not zipfile.is_zipfile(partial.weights):
        return None
    try:
        rows = {row["name"]: row for row in content["tensors"]}
        return [
            _change(name, tensor, rows[name]["action"], rows[name]["reason"], _rounding(rows[name], "to_zero"))
            for name, tensor in source.weights.items()
        ]
    except (KeyError, TypeError, ValueError):
        return None


def _planned(partial: Partial, source: Source, progress: console.Progress) -> list[Item] | None:
    """Return the items of an interrupted conversion of this source, if there is one."""
    content = partial.read(PLAN)
    if not source.is_of(content):
        return None
    try:
        items = [Item(**row) for row in content["tensors"]]
        firsts = {item.name for item in items if item.alias is None}
    except (KeyError, TypeError):
        return None
    sound = all(item.action in (*IN_FLOAT16, UPCAST, KEEP) and (item.alias or item.name) in firsts for item in items)
    if not sound or [item.name for item in items] != list(source.weights):
        return None
    progress.phase("resuming")
    progress.advance(sum(tensor.nbytes for tensor in source.weights.values()))
    return items


def _plan(source: Source, items: Sequence[Item]) -> dict[str, Any]:
    return {**source.mark, "tensors": [asdict(item) for item in items]}


def _is_laid_out(path: Path, sizes: Sequence[int]) -> bool:
    """Whether there is a file with room for storages of these sizes."""
    try:
        return [place.bytes for place in zip_writer.places(path)] == sizes
    except FileNotFoundError:
        return False
    except OSError:
        raise
    except Exception:  # damaged archives fail in many ways
        return False


# --- the steps --------------------------------------------------------------------------------------------------------


def _survey(source: Source, progress: console.Progress) -> list[Item]:
    """Decide about every tensor; only the one that is looked at stays in memory."""
    progress.phase("surveying")
    items = []
    refs = [TensorRef(name, t, True, []) for name, t in source.weights.items()]
    for ref, action, reason, _, alias in decisions(refs, ()):
        items.append(Item(ref.name, action, reason, alias.name if alias else None))
        for read in filter(None, (ref, alias)):
            give_back_pages(read.tensor)
        progress.advance(ref.tensor.nbytes)
    return items


def _dtype(item: Item, tensor: Tensor) -> torch.dtype:
    return torch.float16 if item.action in IN_FLOAT16 else torch.float32 if item.action == UPCAST else tensor.dtype


def _lay_out(partial: Partial, source: Source, items: Sequence[Item], goes_on: bool) -> None:
    """Note what is to be done, and make the new file with room for all of it; or find both there."""
    state: dict[str, Tensor] = {}
    for item in items:
        tensor = source.weights[item.name]
        # never touched: torch.empty gives addresses, and memory only to who writes
        made = state[item.alias] if item.alias else torch.empty(memory(tensor).shape, dtype=_dtype(item, tensor))
        state[item.name] = made if memory(tensor) is tensor else made.as_strided(tensor.shape, tensor.stride())
    sizes = [memory(state[item.name]).nbytes for item in items if not item.alias]
    files = [sum(sizes), *(path.stat().st_size for path in beside(source.folder))]
    partial.needed = sum(size + BLOCK for size in [*files, *[0] * len(OWN)]) + ROW * len(items)
    if goes_on and _is_laid_out(partial.weights, sizes):
        return
    try:
        partial.begin(_plan(source, items))
        if shutil.disk_usage(partial.folder).free + partial.bytes_held() < partial.needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with partial.appearing(WEIGHTS, LAYING_OUT) as fresh:
            zip_writer.lay_out(fresh, state)
            set_mode(fresh, (source.folder / WEIGHTS).stat().st_mode | 0o600)
    except OSError:
        partial.clear()
        raise


def _fill(partial: Partial, source: Source, items: Sequence[Item], progress: console.Progress) -> list[Change]:
    """Write every tensor that the journal does not know, and the checksums; return what was done to each.

    What the journal knows is compared with the file: after a loss of power it may say more than the disk holds.
    """
    known = {name: entry for name, entry in partial.entries().items() if _is_sound(entry)}
    if known:
        messages.say(f"going on with {partial.folder.name}: {len(known)} of {len(items)} tensors are written")
    progress.phase("converting")
    places = iter(zip_writer.places(partial.weights))
    written: dict[str, dict[str, Any]] = {}
    with partial.weights.open("r+b") as file, partial.journal.open("a") as journal:
        for item in items:
            if item.alias is None:
                place, entry = next(places), known.get(item.name)
                if entry is None or entry["crc32"] != zip_writer.checksum(file, place):
                    entry = _write_tensor(item, source.weights[item.name], file, place)
                    journal.write(journal_line(entry))
                    journal.flush()
                written[item.name] = entry
            progress.advance(source.weights[item.name].nbytes)
    zip_writer.seal(partial.weights, [entry["crc32"] for entry in written.values()])
    return [
        _change(
            item.name,
            source.weights[item.name],
            item.action,
            item.reason,
            _rounding(written[item.alias or item.name], "flushed"),
        )
        for item in items
    ]


def _write_tensor(item: Item, source: Tensor, file: BinaryIO, place: zip_writer.Extent) -> dict[str, Any]:
    """Write one tensor to its place; return its checksum and what rounding lost."""
    source = memory(source)
    target, rounding = torch.empty(source.shape, dtype=_dtype(item, source)), Rounding()
    if item.action == CONVERT:
        rounding = write_half(source, target)
    else:
        target.copy_(plain(source))
    crc = zip_writer.write(file, place, target)
    give_back_pages(source)
    return {"name": item.name, "crc32": crc, "max_error": rounding.max_error, "flushed": rounding.flushed}


def _is_sound(entry: dict[str, Any]) -> bool:
    kinds = {"crc32": int, "max_error": float, "flushed": int}
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def _rounding(row: dict[str, Any], flushed: str) -> Rounding:
    return Rounding(max_error=float(row["max_error"]), flushed=int(row[flushed]))


def _change(name: str, tensor: Tensor, action: str, reason: str, rounding: Rounding) -> Change:
    return change_of(TensorRef(name, tensor, True, []), action, reason, rounding)


def _verify(partial: Partial, source: Source, progress: console.Progress) -> None:
    """Read the new file back: every checksum, and the same keys and shapes as the source."""
    progress.phase("verifying")
    try:
        zip_writer.check(partial.weights, progress.advance)
        state = reading.read(partial.weights)
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in source.weights.items()}:
            raise zipfile.BadZipFile("its names and shapes are not those of the source")
    except OSError:
        raise
    except Exception as error:  # damaged archives fail in many ways
        partial.clear()
        raise UpcastError(
            f"what was read back is not what was written ({error}); a copy must be whole. Check the disk, and convert "
            "again: the broken file is deleted."
        ) from None


def _gather(partial: Partial, source: Source, items: Sequence[Item], changes: Sequence[Change]) -> None:
    """Copy the other files, and write the manifest: from here on the copy is whole."""
    if identity_of(source.folder) != source.identity:
        partial.clear()
        raise UpcastError(
            f"{source.folder / WEIGHTS} changed while it was converted; it must stay as it is. Convert again."
        )
    others = beside(source.folder)
    names, there = {path.name for path in others}, set(partial.names()) - set(OWN)
    if not names <= set(partial.read(PLAN).get("beside", ())):  # what is ours is in the plan before it is in the folder
        partial.write(PLAN, {**_plan(source, items), "beside": sorted(names | there)})
    partial.delete(there - names)
    for path in others:
        partial.copy(path)
    crcs = {name: entry["crc32"] for name, entry in partial.entries().items()}
    rows = [_manifest_row(change, crcs.get(change.name)) for change in changes]
    partial.write(MANIFEST, {**source.mark, "tensors": rows})


def _manifest_row(change: Change, crc: int | None) -> dict[str, Any]:
    return {
        "name": change.name,
        "shape": list(change.shape),
        "from": str(change.dtype).removeprefix("torch."),
        "action": change.action,
        "reason": change.reason,
        "max_error": change.rounding.max_error,
        "to_zero": change.rounding.flushed,
        "crc32": f"{crc:08x}" if crc is not None else None,
    }


def _report(plan: Plan, output: Path) -> str:
    rounded = [change for change in plan.changes if change.in_float16]
    worst = max(rounded, key=lambda change: change.rounding.max_error)
    flushed = sum(change.rounding.flushed for change in rounded if change.action == CONVERT)
    others = ", ".join(f"{count} ({reason})" for reason, count in plan.in_float32().items())
    return "\n".join(
        [
            f"{output}: {console.megabytes(plan.bytes_before)} -> {console.megabytes(plan.bytes_after)}",
            f"in float16: {len(rounded)} tensors, rounding error up to {worst.rounding.max_error:.1e} ({worst.name}), "
            f"{flushed:,} values to zero",
            f"in float32: {others or 'none'}",
            f"verified: {len(plan.changes)} keys and every checksum; details in {MANIFEST}",
        ]
    )

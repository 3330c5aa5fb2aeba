"""``python -m upcast convert``: a float16 twin of a LitGPT checkpoint, written tensor by tensor.

The twin grows in ``OUTPUT.partial``: the weights' file is laid out first, then filled in place, with a journal of
what is done, so that an interrupted conversion goes on where it was. It takes its final name when every checksum has
been read back. What is rounded and what is not is decided by `upcast.planning`, as for a model in memory.
"""

import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcast import checkpoint, console, huge_pages, torch_file
from upcast.errors import UpcastError
from upcast.layout import is_plain, memory, plain
from upcast.planning import CONVERT, IN_FLOAT16, WIDEN, Change, Plan, change_of, settle
from upcast.rounding import Rounding, write_half
from upcast.slot import Slot

WEIGHTS, CONFIG, MANIFEST, JOURNAL = "lit_model.pth", "model_config.yaml", "upcast.json", "upcast.journal"
NOT_COPIED = (
    ".pth",
    ".pt",
    ".bin",
    ".safetensors",
    ".ckpt",
    ".gguf",
    ".lora",
    ".adapter",
    ".adapter_v2",
    ".index.json",
)


@dataclass(frozen=True)
class Item:
    """One tensor of the checkpoint and what becomes of it; ``twin`` names an earlier tensor with the same numbers."""

    name: str
    action: str
    reason: str
    twin: str | None


def convert(folder: Path, output: Path | None = None) -> str:
    """Write a float16 twin of the LitGPT checkpoint in ``folder`` and return a report to print.

    Weights are rounded to nearest float16; vectors and what float16 cannot hold are stored in float32. The files
    beside the weights (config, tokenizer) are copied. Interrupted, it is resumed by the same call.

    Args:
        folder: holds ``model_config.yaml`` and ``lit_model.pth`` in any floating dtype.
        output: the new folder; by default ``folder`` with ``-float16`` after its name.

    Raises:
        UpcastError: nothing to read, no space, or ``output`` is there already or being written by another process.
            Nothing has appeared under the name ``output`` then.
    """
    folder = _checkpoint_folder(folder)
    output = folder.with_name(f"{folder.name}-float16") if output is None else output.resolve()
    source = _identity(folder)
    if _is_twin_of(output, source):
        return f"{output} is there already, converted from this checkpoint: nothing to do"
    _check_free(folder, output)
    weights = checkpoint.read(folder / WEIGHTS)
    in_place = checkpoint.is_mappable(folder / WEIGHTS) and all(map(is_plain, weights.values()))
    if _is_float16(weights) and in_place:
        return _nothing(folder)
    partial = output.with_name(f"{output.name}.partial")
    with _alone(partial):
        progress = console.Progress(_work(weights))
        try:
            items = _started(partial, source, weights, progress) or _survey(weights, progress)
            if all(item.action != CONVERT for item in items) and in_place:
                partial.rmdir()
                return _nothing(folder)
            if not (partial / MANIFEST).is_file():
                _lay_out(partial, source, items, weights)
            changes = _fill(partial, items, weights, progress)
            _verify(partial, weights, progress)
            _finish(folder, partial, output, source, changes)
            huge_pages.settle(output / WEIGHTS)
        finally:
            progress.close()
    plan = Plan(folder.name, tuple(changes))
    console.say(f"converted {folder.name}", plan)
    return _report(plan, output)


def _nothing(folder: Path) -> str:
    return f"{folder} is float16 already: nothing to convert, it is mapped and shared as it is"


def _work(weights: dict[str, Tensor]) -> int:
    """Return the bytes to go through: the source twice, and the new file about once."""
    return sum(2 * tensor.nbytes + 2 * tensor.numel() for tensor in weights.values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def _checkpoint_folder(folder: Path) -> Path:
    """Return the folder, looked for where LitGPT looks: as it is, then under ``checkpoints``."""
    found = next((each for each in (folder, "checkpoints" / folder) if each.is_dir()), None)
    if found is None:
        raise UpcastError(f"no folder {folder}; convert takes a LitGPT checkpoint folder. Check the path.")
    for name in (CONFIG, WEIGHTS):
        if not (found / name).is_file():
            raise UpcastError(
                f"no file {found / name}; a LitGPT checkpoint folder holds {CONFIG} and {WEIGHTS}. "
                "Check the path, or run `litgpt download`."
            )
    return found.resolve()


def _check_free(folder: Path, output: Path) -> None:
    """Refuse an output that is the checkpoint itself, or that is taken."""
    if output == folder:
        raise UpcastError(
            f"the output {output} is the checkpoint itself; nothing is overwritten. Name another folder with --output."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UpcastError(
            f"{output} is there already, and is not a twin of this checkpoint as it is now; nothing is overwritten. "
            "Delete it, or name another folder with --output."
        )


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold ``partial`` for this process."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UpcastError(f"{partial} cannot be made ({error.strerror}). Name another folder with --output.") from None
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UpcastError(f"another process is writing {partial}; one at a time may. Wait for it to end.") from None
    finally:
        os.close(handle)


def _is_float16(weights: dict[str, Tensor]) -> bool:
    halves = [t.dtype == torch.float16 for t in weights.values() if t.dim() >= 2 and t.is_floating_point()]
    return bool(halves) and all(halves)


def _identity(folder: Path) -> dict[str, Any]:
    """Return what tells whether the source is still the same."""
    found = (folder / WEIGHTS).stat()
    return {"folder": folder.name, "bytes": found.st_size, "modified_ns": found.st_mtime_ns}


def _is_twin_of(output: Path, source: dict[str, Any]) -> bool:
    content = _json(output / MANIFEST)
    return content.get("source") == source and (output / WEIGHTS).is_file()


def _json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty one where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# --- the four steps ---------------------------------------------------------------------------------------------------


def _started(
    partial: Path, source: dict[str, Any], weights: dict[str, Tensor], progress: console.Progress
) -> list[Item] | None:
    """Return the items of an interrupted conversion of this source, if there is one; else make room for a new one."""
    content = _json(partial / MANIFEST)
    if content.get("source") == source and content.get("upcast") == version("upcast"):
        progress.advance(sum(tensor.nbytes for tensor in weights.values()))
        return [Item(**item) for item in content["tensors"]]
    for path in partial.iterdir():
        path.unlink()
    return None


def _survey(weights: dict[str, Tensor], progress: console.Progress) -> list[Item]:
    """Decide about every tensor; only the one that is looked at stays in memory."""
    progress.phase("surveying")
    items = []
    for slot, action, reason, _, twin in settle([Slot(name, t, True, []) for name, t in weights.items()], ()):
        items.append(Item(slot.name, action, reason, twin.name if twin else None))
        for read in filter(None, (slot, twin)):
            checkpoint.give_back_pages(read.tensor)
        progress.advance(slot.tensor.nbytes)
    return items


def _lay_out(partial: Path, source: dict[str, Any], items: Sequence[Item], weights: dict[str, Tensor]) -> None:
    """Make the new file, with room for all of it, and note what is to be done."""
    state: dict[str, Tensor] = {}
    for item in items:
        tensor = weights[item.name]
        dtype = torch.float16 if item.action in IN_FLOAT16 else torch.float32 if item.action == WIDEN else tensor.dtype
        # never touched: torch.empty gives addresses, and memory only to who writes
        made = state[item.twin] if item.twin else torch.empty(memory(tensor).shape, dtype=dtype)
        state[item.name] = made if memory(tensor) is tensor else made.as_strided(tensor.shape, tensor.stride())
    needed = sum(memory(state[item.name]).nbytes for item in items if not item.twin)
    try:
        if shutil.disk_usage(partial).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        torch_file.lay_out(partial / WEIGHTS, state)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial)
        raise UpcastError(
            f"the twin needs {console.megabytes(needed)}, and {partial.parent} has no room for it "
            f"({str(error).splitlines()[0]}). Free some space, or name a folder elsewhere with --output."
        ) from None
    content = {"upcast": version("upcast"), "source": source, "tensors": [asdict(item) for item in items]}
    _write_json(partial / MANIFEST, content)


def _fill(partial: Path, items: Sequence[Item], weights: dict[str, Tensor], progress: console.Progress) -> list[Change]:
    """Write every tensor that the journal does not know, and the checksums; return what was done to each."""
    done = _read_journal(partial / JOURNAL)
    if done:
        console.say(f"going on with {partial.name}: {len(done)} of {len(items)} tensors are written")
    progress.phase("converting")
    targets = torch_file.mapped_for_writing(partial / WEIGHTS)
    with (partial / JOURNAL).open("a") as journal:
        for item in items:
            if item.name not in done and item.twin is None:
                done[item.name] = _write_tensor(item, weights[item.name], targets[item.name])
                journal.write(json.dumps({"name": item.name, **done[item.name]}) + "\n")
                journal.flush()
            progress.advance(weights[item.name].nbytes)
    del targets
    torch_file.seal(partial / WEIGHTS, [done[item.name]["crc32"] for item in items if item.twin is None])
    return [_change(item, weights[item.name], done[item.twin or item.name]) for item in items]


def _write_tensor(item: Item, source: Tensor, target: Tensor) -> dict[str, Any]:
    """Write one tensor to the mapped file; return its checksum and what rounding lost."""
    source, target, rounding = memory(source), memory(target), Rounding()
    if item.action == CONVERT:
        rounding = write_half(source, target)
    else:
        target.copy_(plain(source))
    crc = torch_file.checksum(target)
    for mapped in (source, target):
        checkpoint.give_back_pages(mapped)
    return {"crc32": crc, "max_error": rounding.max_error, "flushed": rounding.flushed}


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> entry for what was written; a last line that was cut short counts for nothing."""
    done: dict[str, dict[str, Any]] = {}
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    for line in whole.splitlines():
        entry = json.loads(line)
        done[entry.pop("name")] = entry
    path.write_text(whole + "\n" if whole else "")
    return done


def _change(item: Item, tensor: Tensor, entry: dict[str, Any]) -> Change:
    rounding = Rounding(max_error=entry["max_error"], flushed=entry["flushed"])
    return change_of(Slot(item.name, tensor, True, []), item.action, item.reason, rounding)


def _verify(partial: Path, weights: dict[str, Tensor], progress: console.Progress) -> None:
    """Read the new file back: every checksum, and the same keys and shapes as the source."""
    progress.phase("verifying")
    try:
        torch_file.check(partial / WEIGHTS, progress.advance)
        state = checkpoint.read(partial / WEIGHTS)
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in weights.items()}:
            raise zipfile.BadZipFile("its names and shapes are not those of the source")
    except (zipfile.BadZipFile, UpcastError) as error:
        shutil.rmtree(partial)
        raise UpcastError(
            f"what was read back is not what was written ({error}); a twin must be whole. Check the disk, and convert "
            "again: the broken file is deleted."
        ) from None


def _finish(folder: Path, partial: Path, output: Path, source: dict[str, Any], changes: Sequence[Change]) -> None:
    """Copy the other files, write the manifest, and give the folder its final name."""
    if _identity(folder) != source:
        shutil.rmtree(partial)
        raise UpcastError(f"{folder / WEIGHTS} changed while it was converted; it must stay as it is. Convert again.")
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name not in (MANIFEST, JOURNAL):
            shutil.copy2(path, partial / path.name)
    journal = _read_journal(partial / JOURNAL)
    rows = [_manifest_row(change, journal.get(change.name)) for change in changes]
    _write_json(partial / MANIFEST, {"upcast": version("upcast"), "source": source, "tensors": rows})
    (partial / JOURNAL).unlink()
    partial.rename(output)


def _manifest_row(change: Change, entry: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": change.name,
        "shape": list(change.shape),
        "from": str(change.dtype).removeprefix("torch."),
        "action": change.action,
        "reason": change.reason,
        "max_error": change.rounding.max_error,
        "to_zero": change.rounding.flushed,
        "crc32": f"{entry['crc32']:08x}" if entry else None,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all, also after a loss of power."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


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

"""``python -m upcast convert``: a float16 copy of a LitGPT checkpoint, written tensor by tensor.

What is rounded and what is not is decided by `upcast.patching.plan`, as for a model in memory; how a copy grows, by
`upcast.checkpoint.conversion`.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from upcast.checkpoint import conversion, extents, reading, zip_writer
from upcast.checkpoint.conversion_kind import Conversion, Folders, Item
from upcast.checkpoint.extents import Extent
from upcast.checkpoint.output_folder import MANIFEST, WEIGHTS, Partial
from upcast.core import console, messages
from upcast.core.memory_layout import memory, plain
from upcast.core.pages import give_back_pages
from upcast.core.tensor_ref import TensorRef
from upcast.integrations.litgpt.convert_source import (
    beside,
    checkpoint_folder,
    identity_of,
    is_float16,
    is_usable,
    read_source,
)
from upcast.kernels.rounding import Rounding, write_half
from upcast.patching.plan import CONVERT, IN_FLOAT16, KEEP, UPCAST, Change, Plan, change_of, decisions

KIND = "a float16 copy"


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
    folder, folders = checkpoint_folder(folder), Folders(identity_of, beside)
    partial = Partial(conversion.followed(folder.with_name(f"{folder.name}-float16") if output is None else output))
    with partial.errors_told():

        def already() -> str | None:
            return conversion.already(folder, partial.output, KIND, folders, Float16.is_whole)

        done = None if partial.lock.exists() else already()
        if done is not None:
            return done
        source = read_source(folder)
        if is_float16(source) and is_usable(source):
            return _nothing(folder, True)
        partial.needed = sum(2 * tensor.numel() for tensor in source.weights.values())  # the survey will know better
        with partial.alone():  # and ask again: the run before this one may have ended meanwhile
            return already() or conversion.run(Float16(source, partial, folders, {WEIGHTS: WEIGHTS}))


def _nothing(folder: Path, halves: bool) -> str:
    if halves:
        return f"{folder} is float16 already: nothing to convert, it is mapped and shared as it is"
    return f"{folder} has no weight that float16 can hold: nothing to convert"


class Float16(Conversion):
    """A ``lit_model.pth`` rounded to float16."""

    kind = KIND

    def survey(self, progress: console.Progress) -> list[Item]:
        """Decide about every tensor as patching would."""
        progress.phase("surveying")
        items = []
        refs = [TensorRef(name, t, True, []) for name, t in self.source.weights.items()]
        for ref, action, reason, _, alias in decisions(refs, ()):
            items.append(Item(ref.name, action, reason, alias.name if alias else None))
            for read in filter(None, (ref, alias)):
                give_back_pages(read.tensor)
            progress.advance(ref.tensor.nbytes)
        return items

    def is_sound(self, items: Sequence[Item]) -> bool:
        """Whether every action is known, and every alias stands for a tensor that is written."""
        firsts = {item.name for item in items if item.alias is None}
        return all(item.action in (*IN_FLOAT16, UPCAST, KEEP) and (item.alias or item.name) in firsts for item in items)

    def nothing(self, items: Sequence[Item]) -> str:
        """Return why there is nothing to round, where the file can be used as it is."""
        halves = any(item.action in IN_FLOAT16 for item in items)
        if not any(item.action == CONVERT for item in items) and (not halves or is_usable(self.source)):
            return _nothing(self.source.folder, halves)
        return ""

    def outlines(self, output: str, items: Mapping[str, Item]) -> dict[str, Tensor]:
        """Return tensors in memory that is never touched, so that `torch.save` sees which share theirs."""
        state: dict[str, Tensor] = {}
        for item in items.values():
            tensor = self.source.weights[item.name]
            # never touched: torch.empty gives addresses, and memory only to who writes
            made = state[item.alias] if item.alias else torch.empty(memory(tensor).shape, dtype=_dtype(item, tensor))
            state[item.name] = made if memory(tensor) is tensor else made.as_strided(tensor.shape, tensor.stride())
        return state

    def lay_out(self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]) -> None:
        """Write the torch.save file without its numbers."""
        zip_writer.lay_out(path, state)

    def places(
        self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]
    ) -> list[Extent] | None:
        """Return the places of the storages."""
        sizes = [memory(state[item.name]).nbytes for item in items.values() if not item.alias]
        return zip_writer.places_of(path, sizes)

    def write(self, item: Item, file: BinaryIO, place: Extent) -> dict[str, Any]:
        """Write one tensor; the journal gets its checksum, and what rounding lost."""
        source = memory(self.source.weights[item.name])
        target, rounding = torch.empty(source.shape, dtype=_dtype(item, source)), Rounding()
        if item.action == CONVERT:
            rounding = write_half(source, target)
        else:
            target.copy_(plain(source))
        crc = extents.write(file, place, target)
        give_back_pages(source)
        return {"name": item.name, "crc32": crc, "max_error": rounding.max_error, "flushed": rounding.flushed}

    def is_entry(self, entry: dict[str, Any]) -> bool:
        """Whether the journal says all of a tensor."""
        kinds = {"crc32": int, "max_error": float, "flushed": int}
        return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())

    def seal(self, path: Path, checksums: Sequence[int]) -> None:
        """Put the checksums where the zip format wants them."""
        zip_writer.seal(path, checksums)

    def verify(self, path: Path, output: str, progress: console.Progress) -> None:
        """Compare every checksum, and names and shapes with the source's."""
        zip_writer.check(path, progress.advance)
        state = reading.read(path)
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in self.source.weights.items()}:
            raise zipfile.BadZipFile("its names and shapes are not those of the source")

    @staticmethod
    def is_whole(path: Path) -> bool:
        """Whether the file ends as an archive does."""
        return zipfile.is_zipfile(path)

    def row(self, item: Item, entry: dict[str, Any], crc: str | None) -> dict[str, Any]:
        """Return what the manifest says of a tensor."""
        tensor = self.source.weights[item.name]
        return {
            "name": item.name,
            "shape": list(tensor.shape),
            "from": str(tensor.dtype).removeprefix("torch."),
            "action": item.action,
            "reason": item.reason,
            "max_error": entry["max_error"],
            "to_zero": entry["flushed"],
            "crc32": crc,
        }

    def say(self, rows: Sequence[dict[str, Any]]) -> None:
        """Say that the copy is there, and at the most talkative level what became of each tensor."""
        messages.say(f"converted {self.source.folder.name}", self._plan(rows))

    def report(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return sizes, rounding, and what stayed in float32."""
        return _report(self._plan(rows), self.partial.output)

    def _plan(self, rows: Sequence[dict[str, Any]]) -> Plan:
        return Plan(self.source.folder.name, tuple(map(self._change, rows)))

    def _change(self, row: dict[str, Any]) -> Change:
        ref = TensorRef(row["name"], self.source.weights[row["name"]], True, [])
        rounding = Rounding(max_error=float(row["max_error"]), flushed=int(row["to_zero"]))
        return change_of(ref, row["action"], row["reason"], rounding)


def _dtype(item: Item, tensor: Tensor) -> torch.dtype:
    return torch.float16 if item.action in IN_FLOAT16 else torch.float32 if item.action == UPCAST else tensor.dtype


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

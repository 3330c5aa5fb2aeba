"""``python -m upcast convert --storage packed``, and ``--storage bfloat16`` on the way back: no bit changes.

A packed copy holds what is bfloat16's in 12 bits a number (`upcast.checkpoint.packed_file`), and everything else as it
was. How a copy grows stands in `upcast.checkpoint.conversion`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from upcast.checkpoint import conversion, extents, packed_file, reading, safetensors_file, zip_writer
from upcast.checkpoint.conversion_kind import Conversion, Item
from upcast.checkpoint.extents import Extent
from upcast.checkpoint.output_folder import MANIFEST, Partial
from upcast.checkpoint.packed_file import Description, Packed
from upcast.core import console
from upcast.core.errors import UpcastError
from upcast.core.pages import give_back_pages
from upcast.core.tensor_ref import TensorRef
from upcast.integrations import checkpoint_kinds
from upcast.integrations.checkpoint_kinds import Kind
from upcast.integrations.exact_tensors import born, check_storable, give_back, numbers, same_bits
from upcast.kernels import packed
from upcast.patching.plan import KEEP, PACK, SHARE, Aliases
from upcast.tensor.packed_weight import PackedWeight, as_matrix, fitting

UNPACK = "unpack"


def pack(folder: Path, output: Path | None = None) -> str:
    """Write a packed copy of a checkpoint of LitGPT or Transformers, and return a report to print.

    Weights whose numbers are all bfloat16's take 12 bits a number, the rest stays as it is: no bit of a number is lost.
    The other files of the folder are copied. Interrupted, it is resumed by the same call.

    Args:
        folder: holds the checkpoint.
        output: the new folder; by default ``folder`` with ``-packed`` after its name.

    Raises:
        UpcastError: nothing to read, no space, or ``output`` is there already or being written by another process.
            Nothing has appeared under the name ``output`` then.
    """
    kind = checkpoint_kinds.find(folder)
    if kind.is_packed:
        return f"{kind.folder} is packed already: nothing to convert, it is mapped and shared as it is"
    return _converted(kind, output, Packing)


def unpack(folder: Path, output: Path | None = None) -> str:
    """Write the checkpoint that ``folder`` was packed from, bit for bit, and return a report to print.

    Args:
        folder: what `pack` has written.
        output: the new folder; by default ``folder`` with ``-bfloat16`` after its name.

    Raises:
        UpcastError: as for `pack`, or ``folder`` is not packed.
    """
    kind = checkpoint_kinds.find(folder)
    if not kind.is_packed:
        raise UpcastError(
            f"{kind.folder} is not packed; --storage bfloat16 turns a packed checkpoint into an ordinary one. Use this "
            "one as it is."
        )
    return _converted(kind, output, Unpacking)


def _converted(kind: Kind, output: Path | None, made: "type[Packing | Unpacking]") -> str:
    folder, folders = kind.folder, kind.folders()
    default = folder.with_name(f"{folder.name}-{made.suffix}")
    partial = Partial(conversion.followed(default if output is None else output))
    with partial.errors_told():

        def already() -> str | None:
            return conversion.already(folder, partial.output, made.kind, folders, made.is_whole)

        done = None if partial.lock.exists() else already()
        if done is not None:
            return done
        folders.written(folder)  # what it refuses is refused before the work
        source = kind.read()
        for name, tensor in source.weights.items():
            check_storable(name, tensor)
        partial.needed = sum(2 * tensor.numel() for tensor in source.weights.values())  # the survey will know better
        with partial.alone():  # and ask again: the run before this one may have ended meanwhile
            return already() or conversion.run(made(source, partial, folders, kind.outputs))


class _Exact(Conversion):
    """A copy in which every tensor has the bits that it had."""

    def lay_out(self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]) -> None:
        """Write the file without its numbers."""
        if _is_archive(output):
            zip_writer.lay_out(path, state)
        else:
            safetensors_file.lay_out(path, state, self.metadata(output, items))

    def places(
        self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]
    ) -> list[Extent] | None:
        """Return the places of what is written."""
        if _is_archive(output):
            return zip_writer.places_of(path, [state[item.name].nbytes for item in items.values() if not item.alias])
        about = self.metadata(output, items)
        return safetensors_file.places(state, about) if safetensors_file.is_laid_out(path, state, about) else None

    def metadata(self, output: str, items: Mapping[str, Item]) -> dict[str, str]:
        """Return the texts in the header of a safetensors file."""
        source = self.source.folder / self.outputs[output]
        return {} if _is_archive(source.name) else packed_file.metadata(source)

    def write(self, item: Item, file: BinaryIO, place: Extent) -> dict[str, Any]:
        """Write one tensor; the journal gets its checksum."""
        tensor = self.source.weights[item.name]
        target = self.bytes_of(item, tensor)
        crc = extents.write(file, place, target)
        give_back(tensor)
        return {"name": item.name, "crc32": crc}

    def bytes_of(self, item: Item, tensor: Tensor) -> Tensor:
        """Return what is written of a tensor."""
        return numbers(tensor)

    def is_entry(self, entry: dict[str, Any]) -> bool:
        """Whether the journal says all of a tensor."""
        return isinstance(entry.get("crc32"), int)

    def seal(self, path: Path, checksums: Sequence[int]) -> None:
        """Have the file on the disk."""
        if _is_archive(path.name):
            zip_writer.seal(path, checksums)
        else:
            extents.sync(path)

    def verify(self, path: Path, output: str, progress: console.Progress) -> None:
        """Compare every tensor with the source's, bit for bit."""
        extents.forget(path)
        wanted = self.source.files[self.outputs[output]]
        found = _read(path)
        if set(found) != set(wanted):
            raise ValueError("its names are not those of the source")
        if _is_archive(output):
            zip_writer.check(path, lambda _: None)
        for name, tensor in wanted.items():
            if not same_bits(numbers(found[name]), numbers(tensor)):
                raise ValueError(f"{name} has other bits")
            for each in (found[name], tensor):
                give_back(each)
            progress.advance(found[name].nbytes)

    @staticmethod
    def is_whole(path: Path) -> bool:
        """Whether the file is there, and its directory or header accounts for all of it."""
        with suppress(UpcastError):
            return zip_writer.places_of(path) is not None if _is_archive(path.name) else bool(_header(path))
        return False

    def row(self, item: Item, entry: dict[str, Any], crc: str | None) -> dict[str, Any]:
        """Return what the manifest says of a tensor."""
        tensor = self.source.weights[item.name]
        return {
            "name": item.name,
            "shape": list(tensor.shape),
            "from": str(born(tensor)).removeprefix("torch."),
            "action": item.action,
            "reason": item.reason,
            "escapes": item.escapes,
            "crc32": crc,
        }

    def sizes(self) -> str:
        """Return what both folders' files of weights take."""
        partial = self.partial.folder if self.partial.folder.is_dir() else self.partial.output
        before = sum((self.source.folder / name).stat().st_size for name in self.source.files)
        after = sum((partial / name).stat().st_size for name in self.outputs)
        return f"{self.partial.output}: {console.megabytes(before)} -> {console.megabytes(after)}"


class Packing(_Exact):
    """An ordinary checkpoint becomes a packed one."""

    kind, suffix = "a packed copy", "packed"

    def survey(self, progress: console.Progress) -> list[Item]:
        """Look which weights are bfloat16's."""
        progress.phase("surveying")
        items = []
        for tensors in self.source.files.values():
            aliases = Aliases()
            for name, tensor in tensors.items():
                items.append(_looked_at(name, tensor, aliases))
                give_back_pages(tensor)
                progress.advance(tensor.nbytes)
        return items

    def is_sound(self, items: Sequence[Item]) -> bool:
        """Whether every action is known, and every alias stands for a tensor that is written to the same file."""
        for tensors in self.source.files.values():
            part = [item for item in items if item.name in tensors]
            firsts = {item.name for item in part if item.alias is None}
            if not all((item.alias or item.name) in firsts and _is_known(item, tensors[item.name]) for item in part):
                return False
        return True

    def nothing(self, items: Sequence[Item]) -> str:
        """Return why there is nothing to pack."""
        if any(item.action == PACK for item in items):
            return ""
        return f"{self.source.folder} has no weight whose numbers are bfloat16's: nothing to convert"

    def outlines(self, output: str, items: Mapping[str, Item]) -> dict[str, Tensor]:
        """Return the tensors of the file: of a packed one its bytes, of one that is tied nothing."""
        without, state = safetensors_file.without_numbers, dict[str, Tensor]()
        for item in items.values():
            tensor = self.source.weights[item.name]
            if item.action == PACK:
                state[item.name] = without(torch.uint8, (_described(item, tensor).stored_size,))
            elif item.alias is None:
                state[item.name] = without(tensor.dtype, tensor.shape)
        return state

    def metadata(self, output: str, items: Mapping[str, Item]) -> dict[str, str]:
        """Return the source's texts, and what is packed."""
        weights = self.source.weights
        tensors = {i.name: _described(i, weights[i.name]) for i in items.values() if i.action == PACK}
        tied = {item.name: item.alias for item in items.values() if item.alias is not None}
        return {**super().metadata(output, items), packed_file.KEY: Description(tensors, tied).text()}

    def bytes_of(self, item: Item, tensor: Tensor) -> Tensor:
        """Return a weight packed, filled up with zeros; or a tensor as it is."""
        whole = numbers(tensor)
        if item.action != PACK:
            return whole
        what, (found, _) = _described(item, tensor), fitting(whole, "packed")
        if found is None or found.escapes != item.escapes:
            raise UpcastError(
                f"{self.partial.folder}: its plan does not fit {item.name}; it must be as it was written. Delete that "
                "folder, and convert again."
            )
        stored = torch.zeros(what.stored_size, dtype=torch.uint8)
        packed.pack(as_matrix(whole), found, out=stored[: what.size])
        return stored

    def report(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return sizes, how many bits a number takes, and what is not packed."""
        what = [
            Packed.of(getattr(torch, row["from"]), tuple(row["shape"]), row["escapes"])
            for row in rows
            if row["action"] == PACK
        ]
        count = sum(each.rows * each.columns for each in what)
        bits, escapes = 8 * sum(each.size for each in what) / count, sum(each.escapes for each in what)
        return "\n".join(
            [
                self.sizes(),
                f"packed: {len(what)} tensors, {bits:.2f} bits a number, {escapes:,} escapes",
                f"as they were: {_others(rows)}",
                f"verified: {len(rows)} tensors, every bit; details in {MANIFEST}",
            ]
        )


class Unpacking(_Exact):
    """A packed checkpoint becomes the one that it was."""

    kind, suffix = "a bfloat16 copy", "bfloat16"

    def survey(self, progress: console.Progress) -> list[Item]:
        """List the tensors; an archive holds the numbers of tied ones once."""
        progress.phase("surveying")
        items = []
        for output, name in self.outputs.items():
            firsts: dict[int, str] = {}
            for each, tensor in self.source.files[name].items():
                alias = firsts.setdefault(id(tensor), each) if _is_archive(output) else each
                action = UNPACK if isinstance(tensor, PackedWeight) else KEEP
                items.append(Item(each, action, "", None if alias == each else alias))
                progress.advance(tensor.nbytes)
        return items

    def is_sound(self, items: Sequence[Item]) -> bool:
        """Whether they are what a survey finds."""
        return list(items) == self.survey(console.Progress(0))

    def nothing(self, items: Sequence[Item]) -> str:
        """Return nothing: a packed folder can always be unpacked."""
        return ""

    def outlines(self, output: str, items: Mapping[str, Item]) -> dict[str, Tensor]:
        """Return the tensors of the file; for an archive, which sees who shares memory, in memory never touched."""
        device, state = "cpu" if _is_archive(output) else "meta", dict[str, Tensor]()
        for item in items.values():
            tensor = self.source.weights[item.name]
            made = torch.empty(tensor.shape, dtype=born(tensor), device=device) if item.alias is None else None
            state[item.name] = state[item.alias or item.name] if made is None else made
        return state

    def report(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return sizes, and what was packed."""
        count = sum(row["action"] == UNPACK for row in rows)
        return "\n".join(
            [
                self.sizes(),
                f"unpacked: {count} tensors; {len(rows) - count} as they were",
                f"verified: {len(rows)} tensors, every bit; details in {MANIFEST}",
            ]
        )


def _looked_at(name: str, tensor: Tensor, aliases: Aliases) -> Item:
    if tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
        return Item(name, KEEP, "a vector" if tensor.dim() == 1 else "not a weight", None)
    alias = aliases.find(TensorRef(name, tensor, True, [])) if tensor.element_size() > 1 else None
    if alias is not None:
        give_back_pages(alias.tensor)
        return Item(name, SHARE, f"equal to {alias.name}", alias.name)
    if tensor.dtype == torch.float16 and bool(tensor.isnan().any()):
        return Item(name, KEEP, "float16 with NaNs", None)  # on the way through float32 processors change their bits
    found, why = fitting(numbers(tensor), "packed")
    if found is None:
        return Item(name, KEEP, why, None)
    return Item(name, PACK, "", None, found.escapes)


def _is_known(item: Item, tensor: Tensor) -> bool:
    if item.action == PACK:
        fits = tensor.dim() >= 2 and tensor.numel() > 0 and tensor.dtype in packed_file.BORN.values()
        return fits and item.alias is None and isinstance(item.escapes, int) and 0 <= item.escapes <= tensor.numel()
    return (item.action == SHARE) == (item.alias is not None) and item.action in (KEEP, SHARE)


def _described(item: Item, tensor: Tensor) -> Packed:
    return Packed.of(tensor.dtype, tuple(tensor.shape), item.escapes)


def _is_archive(name: str) -> bool:
    return name.endswith(".pth")


def _header(path: Path) -> safetensors_file.Header:
    return safetensors_file.read_header(path)


def _read(path: Path) -> dict[str, Tensor]:
    if _is_archive(path.name):
        return reading.read(path)
    header = _header(path)
    return packed_file.read(path) if packed_file.KEY in header.metadata else safetensors_file.mapped(path, header)


def _others(rows: Sequence[dict[str, Any]]) -> str:
    reasons: dict[str, int] = {}
    for row in rows:
        if row["action"] != PACK:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return ", ".join(f"{count} ({reason})" for reason, count in reasons.items()) or "none"

"""What a conversion of a checkpoint folder has to say of itself; `conversion` carries it out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from upcast.checkpoint.extents import Extent
from upcast.checkpoint.output_folder import Partial
from upcast.core import console, messages
from upcast.core.about import VERSION


@dataclass(frozen=True)
class Item:
    """One tensor of the checkpoint and what becomes of it; ``alias`` names an earlier tensor with the same numbers."""

    name: str
    action: str
    reason: str
    alias: str | None
    escapes: int = 0


@dataclass(frozen=True)
class Source:
    """The checkpoint: its folder, its tensors file by file, and what tells whether the files are still the same."""

    folder: Path
    identity: dict[str, Any]
    files: dict[str, dict[str, Tensor]]

    @property
    def weights(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}

    @property
    def first(self) -> Path:
        """The first file of weights."""
        return self.folder / next(iter(self.files))


@dataclass(frozen=True)
class Folders:
    """What a conversion has to know of the kind of folder.

    Attributes:
        identity: tells whether a checkpoint is still the same.
        beside: the files that come along as they are.
        written: names and contents of files that come along changed, by name; of the same name in the checkpoint.
    """

    identity: Callable[[Path], dict[str, Any]]
    beside: Callable[[Path], list[Path]]
    written: Callable[[Path], dict[str, bytes]] = lambda _: {}


class Conversion(ABC):
    """One conversion, of one checkpoint into one folder.

    Attributes:
        kind: what the copy is, as in "a float16 copy".
        outputs: file of the copy -> the checkpoint's file whose tensors it holds.
    """

    kind: str

    def __init__(self, source: Source, partial: Partial, folders: Folders, outputs: Mapping[str, str]) -> None:
        self.source, self.partial, self.folders, self.outputs = source, partial, folders, dict(outputs)

    # --- what differs -------------------------------------------------------------------------------------------------

    @abstractmethod
    def survey(self, progress: console.Progress) -> list[Item]:
        """Decide about every tensor; only the one that is looked at stays in memory."""

    @abstractmethod
    def is_sound(self, items: Sequence[Item]) -> bool:
        """Whether items of a plan, of all tensors in their order, can be carried out."""

    @abstractmethod
    def nothing(self, items: Sequence[Item]) -> str:
        """Return why there is nothing to do, or an empty string."""

    @abstractmethod
    def outlines(self, output: str, items: Mapping[str, Item]) -> dict[str, Tensor]:
        """Return the tensors of a file of the copy, without their numbers."""

    @abstractmethod
    def lay_out(self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]) -> None:
        """Write a file of the copy with room for its numbers."""

    @abstractmethod
    def places(
        self, path: Path, output: str, state: dict[str, Tensor], items: Mapping[str, Item]
    ) -> list[Extent] | None:
        """Return where the numbers lie, in order, of what is no alias; None where this is not the file laid out."""

    @abstractmethod
    def write(self, item: Item, file: BinaryIO, place: Extent) -> dict[str, Any]:
        """Write one tensor to its place; return what the journal says of it: name, crc32 and more."""

    @abstractmethod
    def is_entry(self, entry: dict[str, Any]) -> bool:
        """Whether what the journal says of a tensor is complete."""

    @abstractmethod
    def seal(self, path: Path, checksums: Sequence[int]) -> None:
        """Have a file that is filled be whole, and on the disk."""

    @abstractmethod
    def verify(self, path: Path, output: str, progress: console.Progress) -> None:
        """Read a file back from the disk.

        Raises:
            Exception: of any kind, it is not what was to be written.
        """

    @staticmethod
    @abstractmethod
    def is_whole(path: Path) -> bool:
        """Whether a file of the copy is there, as far as can be told without reading all of it."""

    @abstractmethod
    def row(self, item: Item, entry: dict[str, Any], crc: str | None) -> dict[str, Any]:
        """Return what the manifest says of a tensor."""

    @abstractmethod
    def report(self, rows: Sequence[dict[str, Any]]) -> str:
        """Return what to print of a copy that is whole.

        Raises:
            KeyError, TypeError, ValueError: the rows are none of ours.
        """

    def say(self, rows: Sequence[dict[str, Any]]) -> None:
        """Say that the copy is there."""
        messages.say(f"converted {self.source.folder.name}")

    # --- what is noted ------------------------------------------------------------------------------------------------

    @property
    def mark(self) -> dict[str, Any]:
        """What a plan and a manifest begin with."""
        beside = [*self.folders.beside(self.source.folder), *map(Path, self.folders.written(self.source.folder))]
        return {
            "upcast": VERSION,
            "kind": self.kind,
            "source": self.source.identity,
            "weights": list(self.outputs),
            "beside": [path.name for path in beside],
        }

    def is_of(self, content: dict[str, Any]) -> bool:
        """Whether a plan or a manifest is of this conversion, by this version."""
        own = {"upcast": VERSION, "kind": self.kind, "source": self.source.identity, "weights": list(self.outputs)}
        return all(content.get(name) == value for name, value in own.items())

    def work(self) -> int:
        """Return the bytes to go through: the source twice, and the new files about once."""
        return sum(2 * tensor.nbytes + 2 * tensor.numel() for tensor in self.source.weights.values())

    def of_file(self, output: str, items: Sequence[Item]) -> dict[str, Item]:
        """Return the items of a file of the copy, by name."""
        names = self.source.files[self.outputs[output]]
        return {item.name: item for item in items if item.name in names}

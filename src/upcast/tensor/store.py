"""Where the numbers of a HalfWeight live: float16 memory that a weight shares with its views."""

import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from upcast.tensor.half_weight import HalfWeight


class Fallbacks:
    """What happened to the weights of one patched model: float32 copies, and weights that became float32."""

    def __init__(self, model: str = "a model") -> None:
        self.model = model  # what it is called, for messages
        self.calls: dict[str, int] = {}
        self.largest: dict[str, int] = {}
        self.dissolved: dict[str, tuple[int, int]] = {}  # reason -> how many weights, and their bytes in float32
        self.missed_gradient = False  # a backward pass went by weights that report that they require grad
        self.learning: set[int] = set()  # which parts of the model went into training mode after the patch
        self._lock = threading.RLock()  # what a signal calls may count as well

    def count(self, operation: str, elements: int) -> None:
        """Note one float32 copy of ``elements`` numbers made for ``operation``."""
        with self._lock:
            self.calls[operation] = self.calls.get(operation, 0) + 1
            self.largest[operation] = max(self.largest.get(operation, 0), 4 * elements)

    def dissolve(self, reason: str, elements: int) -> bool:
        """Note that a weight of ``elements`` numbers has become float32; return whether it is the first for that."""
        with self._lock:
            weights, size = self.dissolved.get(reason, (0, 0))
            self.dissolved[reason] = (weights + 1, size + 4 * elements)
        return not weights

    def __reduce__(self) -> tuple[type["Fallbacks"], tuple[str], dict[str, set[int]]]:
        return (Fallbacks, (self.model,), {"learning": set(self.learning)})  # a copy of a model starts its own count

    def __str__(self) -> str:
        rows = [f"{name}: {n} calls, up to {self.largest[name]:,} bytes" for name, n in sorted(self.calls.items())]
        return "\n".join(rows) or "none"


BLURRED = 3  # how often rounding may be a part of an update, or an update not looked at


class Region(NamedTuple):
    """A part of a store's memory, looked at in some shape; ``offset`` counts from the first number."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, memory: Tensor) -> Tensor:
        """Return this view of the store's float16 or float32 memory."""
        return memory.as_strided(self.size, self.stride, memory.storage_offset() + self.offset)


def region_of(part: Tensor, whole: Tensor | None) -> Region | None:
    """Return where ``part`` lies in ``whole``, whose storage it shares; None where it is the same."""
    if whole is None or (part.shape == whole.shape and part.stride() == whole.stride()):
        offset = 0 if whole is None else part.storage_offset() - whole.storage_offset()
        if not offset:
            return None
    assert whole is not None
    return Region(tuple(part.shape), part.stride(), int(part.storage_offset() - whole.storage_offset()))


changes = threading.RLock()  # two threads may find at once that a weight has to move


class Store:
    """The memory of one weight.

    Attributes:
        half: the float16 numbers; None once they have dissolved.
        fallbacks: the patched model's account.
        wide: the float32 numbers, once they have dissolved.
        sharing: how many stores use the very same ``half`` (weights that are equal), or None.
        before: the weight's dtype before the patch.
        blurred: how many updates were so small that rounding was a part of them, or were not looked at.
        handed: the version of ``half`` when a state dict was given it; None if it was written by us since.
        written: what was computed for ``weight.data += ...`` and is written already; it is yet to be assigned.
        former: the float16 numbers before ``weight.data = x``, as long as ``wide`` is the memory of ``x``.
    """

    dissolved = False  # whether any store of the process has: then HalfWeights are looked at twice
    name = "float16"  # of what it stores
    field = "half"  # the attribute that holds it
    kind: "type[HalfWeight]"  # what stands for the numbers: set where that is defined
    learning = False  # whether any model went into training mode after its patch: then so under autograd

    # What most stores have; a cache makes two stores for every layer and token.
    wide: Tensor | None = None
    sharing: list[int] | None = None
    before = torch.float32
    blurred = 0
    handed: int | None = None
    written: "weakref.ref[Tensor] | None" = None
    former: Tensor | None = None

    def __init__(self, half: Tensor, fallbacks: Fallbacks) -> None:
        self.half: Tensor | None = half
        self.fallbacks = fallbacks

    @property
    def held(self) -> bool:
        """Whether the numbers are stored here, and have not dissolved."""
        return self.half is not None

    @property
    def outline(self) -> Tensor | None:
        """A tensor that lies in memory as the stored one does, to make views of."""
        return self.half

    @property
    def bytes(self) -> Tensor | None:
        """The tensor that is in memory."""
        return self.half

    def written_times(self) -> int:
        """Return how often the memory was written."""
        return 0 if self.half is None else self.half._version

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "written": None, "handed": None}

    def share(self, other: "Store") -> None:
        """Use the memory of ``other``, whose numbers are the same, until either is written."""
        self.half = other.half
        self.sharing = other.sharing = other.sharing or [1]
        self.sharing[0] += 1

    def unshare(self) -> None:
        """Have memory that no other weight uses: called before anything is written, or handed out for writing."""
        if self.sharing is None:
            return
        with changes:
            if self.sharing is not None and self.half is not None and self.sharing[0] > 1:
                with torch.inference_mode(False):
                    self.half = _later(like(self.half, torch.float16), self.half)
            self._leave()

    def dissolve(self) -> bool:
        """Go to float32 memory; return whether it was not there already."""
        with changes:
            half = self.half
            if half is None:
                return False
            with torch.inference_mode(False), torch.no_grad():
                self.wide = _later(like(half, torch.float32), half)
            Store.dissolved = True  # before it is true: an interruption comes between any two lines
            self.half = None
            self._leave()
        return True

    def borrowing(self, memory: Tensor) -> "Store":
        """Return a store like this one whose numbers are, for now, the float32 ``memory`` of somebody else."""
        borrower = Store(memory, self.fallbacks)
        borrower.share(self)
        borrower.before, borrower.blurred = self.before, self.blurred
        borrower.former, borrower.half, borrower.wide = borrower.half, None, memory
        Store.dissolved = True
        return borrower

    def borrowed(self) -> Tensor | None:
        """Return the borrowed memory if nothing else holds it any more."""
        wide = self.wide
        return wide if self.former is not None and wide is not None and uses(wide) == 1 else None

    def take_over(self, borrowed: Tensor) -> None:
        """Store the numbers of what was borrowed in float16, as the former ones lay."""
        with changes:
            if self.former is not None:
                with torch.inference_mode(False), torch.no_grad():
                    self.half = torch.empty_like(self.former).copy_(borrowed)
                self._leave()
                self.wide = self.former = None

    def keep_borrowed(self) -> bool:
        """Let the borrowed memory be this store's for good; return whether it was borrowed."""
        with changes:
            borrowed, self.former = self.former is not None, None
            if borrowed:
                self._leave()
        return borrowed

    def _leave(self) -> None:
        sharing, self.sharing = self.sharing, None
        if sharing is not None:
            sharing[0] -= 1  # interrupted before, the others count one too many, and copy once in vain


def uses(tensor: Tensor) -> int:
    """Return how many tensors, this one counted, use its memory; more than one where torch cannot tell.

    Nobody counts who else holds memory that torch did not allocate: an array's, a map's, another library's.
    """
    storage, count = tensor.untyped_storage(), getattr(torch._C, "_storage_Use_Count", None)
    return int(count(storage._cdata)) - 1 if count and storage.resizable() else 2


def _later(copy: Tensor, before: Tensor) -> Tensor:
    """Return ``copy``, which stands for ``before`` from now on, with a version that comes after."""
    if not before.is_inference():
        torch._C._autograd._unsafe_set_version_counter((copy,), (before._version + 1,))
    return copy


def like(source: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of ``source`` in memory of their own, with the same strides."""
    if any(size > 1 and not step for size, step in zip(source.shape, source.stride(), strict=True)):
        return source.to(dtype, copy=True, memory_format=torch.contiguous_format)  # rows that lie on one another
    made = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=source.device)
    return made.copy_(source)

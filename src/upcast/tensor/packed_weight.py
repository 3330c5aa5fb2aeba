"""PackedWeight: a float32 tensor that is stored in 12 bits per number, exactly, as it was in a bfloat16 checkpoint.

It is a HalfWeight in all that it does; only where its numbers live differs. There is no tensor of another dtype inside
that could be looked at, so that views are known by their region, kernels take `upcast.kernels.packed.PackedMatrix`, and
whatever needs the numbers otherwise unpacks them for the moment, to bfloat16.

Written numbers are packed again where they are bfloat16's, and few enough of them unusual; else the weight dissolves.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.core import memory_layout
from upcast.kernels import packed
from upcast.kernels.packed_matrix import RECORD, Born, PackedExperts, PackedMatrix
from upcast.tensor import materialize
from upcast.tensor.half_weight import OTHERWISE, HalfWeight
from upcast.tensor.store import BLURRED, Fallbacks, Region, Store, changes, uses

LENT: "weakref.WeakSet[PackedStore]" = weakref.WeakSet()
"""Those of whose numbers somebody holds a state dict: what is written there is looked for."""
_AT_ITS_END = 2  # tensors use a memory when one of two goes
NOT_PACKED = "numbers that bfloat16 does not have, or many unusual ones, were written into them"


class PackedStore(Store):
    """The packed memory of one weight, which is contiguous; it is never written in place."""

    name = "12 bits"
    field = "matrix"

    def __init__(self, matrix: PackedMatrix, shape: tuple[int, ...], fallbacks: Fallbacks) -> None:
        self.matrix: PackedMatrix | None = matrix
        self.shape, self.fallbacks = shape, fallbacks
        self.before = torch.bfloat16
        self.version = 0
        self.given: Tensor | None = None  # shares the memory of what a state dict was given, until that is gone
        self._handed: weakref.ref[Tensor] | None = None  # that itself
        self._seen = 0  # its version when it was looked at

    @property
    def half(self) -> Tensor | None:
        """The numbers in bfloat16, unpacked for this once."""
        matrix = self.now
        return None if matrix is None else kernels.unpack(matrix).view(self.shape)

    @half.setter
    def half(self, value: Tensor | None) -> None:
        assert value is None, "packed memory is exchanged by `repack`"
        self.matrix = None

    @property
    def now(self) -> PackedMatrix | None:
        """The packed numbers, with what was written into a state dict; None once they have dissolved."""
        if self.given is not None:
            self._look()
        return self.matrix

    @property
    def held(self) -> bool:
        return self.now is not None

    @property
    def outline(self) -> Tensor:
        """A tensor of this shape without numbers; made anew, since torch.compile imitates what is made inside it."""
        return torch.empty(self.shape, dtype=torch.bfloat16, device="meta")

    @property
    def bytes(self) -> Tensor | None:
        return None if self.matrix is None else self.matrix.blob

    def written_times(self) -> int:
        return self.version

    def __getstate__(self) -> dict[str, object]:
        if self.given is not None:
            self._look()
        return {**super().__getstate__(), "given": None, "_handed": None}

    def give(self) -> Tensor:
        """Return the numbers in bfloat16 for a state dict; what is written there arrives when they are next used.

        Those of tied weights are one tensor there, too, as long as somebody holds it.
        """
        handed = None if self._handed is None else self._handed()
        if handed is None:
            with torch.inference_mode(False):
                matrix = self.matrix
                assert matrix is not None
                handed = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu")
                packed.unpack(matrix, handed.view(matrix.rows, matrix.columns))
                self.given = handed.detach()  # one memory, and one count of writes
            self._seen = handed._version
            self._handed = weakref.ref(handed, _forgetting(weakref.ref(self)))
            LENT.add(self)
        return handed

    def _look(self) -> None:
        """Take over what was written into a state dict; forget that where nobody can write there any more."""
        with changes:
            given, handed = self.given, self._handed
            if given is None or handed is None:
                return
            if handed() is None and uses(given) == 1:
                self.forget()
            if given._version != self._seen:
                self._seen = given._version
                self.blurred += 1
                self._take(given)

    def _take(self, given: Tensor) -> None:
        if self.blurred <= BLURRED and self.repack(given):
            return
        self.forget()
        materialize.dissolve_store(self, NOT_PACKED if self.blurred <= BLURRED else materialize.SMALL_STEPS)
        if self.wide is not None:
            self.wide.copy_(given)

    def show(self, wide: Tensor) -> None:
        """Have the state dict that somebody holds follow what was written into the weight: they share memory."""
        if self.given is not None:
            self.given.copy_(wide)
            self._seen = self.given._version

    def forget(self) -> None:
        """Look no more for what is written into a state dict."""
        self.given = self._handed = None
        LENT.discard(self)

    def share(self, other: Store) -> None:
        """Use the memory of ``other``, whose numbers are the same."""
        assert isinstance(other, PackedStore)
        self.matrix = other.matrix  # which is exchanged when either is written

    def repack(self, wide: Tensor) -> bool:
        """Store the numbers of ``wide``, float32, in place of those that are there, if they can be; or return False."""
        found = packable(wide)
        if found is None:
            return False
        self.matrix, self.version = found, self.version + 1
        return True


def _forgetting(owner: "weakref.ref[PackedStore]") -> Callable[[object], None]:
    """Return what gives the memory back when the tensor in a state dict is gone, unless it was written to."""

    def forget(_: object) -> None:
        store = owner()
        given = None if store is None else store.given
        if store is not None and given is not None and given._version == store._seen and uses(given) <= _AT_ITS_END:
            store.forget()

    return forget


class PackedWeight(HalfWeight):
    """A float32 tensor stored in 12 bits per number: those of a bfloat16 checkpoint, bit for bit.

    Examples:
        >>> linear = torch.nn.Linear(128, 64, dtype=torch.bfloat16).eval()
        >>> model = upcast.patch(linear, storage="packed")
        >>> isinstance(model.weight, upcast.PackedWeight), model.weight.dtype
        (True, torch.float32)
        >>> model.state_dict()["weight"].dtype  # made on demand
        torch.bfloat16
    """

    store: PackedStore

    @staticmethod
    def __new__(cls, store: Any, region: Region | None = None, *, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:
            return torch.nn.Parameter(store, requires_grad)
        outline = store.outline if region is None else region.of(store.outline)
        return HalfWeight.wrapper(cls, outline, torch.device("cpu"))

    def __init__(self, store: PackedStore, region: Region | None = None) -> None:
        self.store, self.region = store, region
        self.row_major = region is None and len(store.shape) == 2
        self.wants_grad = False

    @classmethod
    def over(cls, store: Any, region: Region | None, part: Tensor | None = None) -> "PackedWeight":
        """Return what stands for a region of ``store``."""
        return PackedWeight(store, region)

    @property
    def blob(self) -> Tensor:
        """The packed bytes (uint8)."""
        matrix = self.store.now
        assert matrix is not None
        return matrix.blob

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Tell torch.compile and torch.export what to trace: the packed bytes, and what they are."""
        matrix = self.store.now
        assert matrix is not None
        return ["blob"], (matrix[1:], self.store.shape, self.region)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], form: Any, *_: Any) -> "PackedWeight":
        fields, shape, region = form
        made: PackedWeight = OTHERWISE["unflatten packed"](PackedMatrix(inner["blob"], *fields), shape, region)
        return made

    @property
    def outline(self) -> Tensor:
        return self.store.outline if self.region is None else self.region.of(self.store.outline)

    @property
    def operand(self) -> Any:
        """A PackedMatrix or PackedExperts where this is whole rows; else a float32 copy."""
        matrix = self.store.now
        if matrix is None:  # what was written into a state dict, just found, cannot be packed
            return materialize.alias(self)
        if self.row_major:
            return matrix
        found = _operand(matrix, self.outline)
        return self.upcast() if found is None else found

    def memory_for_attention(self) -> Tensor:
        """Return the numbers in float32; learned keys are few."""
        return self.upcast()

    def at_rest(self, function: Any, *args: Any) -> Any:
        """Return bytes and place of the packed memory; one number counts as two bytes, which are not fewer."""
        matrix = self.store.matrix
        if matrix is None or function in _SIZES:
            return function(self.outline)
        if function is _BYTES:
            return (
                matrix.nbytes
                if self.region is None
                else -(-matrix.nbytes * self.outline.numel() // math.prod(self.store.shape))
            )
        return function(matrix.blob, *args)

    def overwrite(self, source: Tensor, *, update: bool = False) -> "PackedWeight":
        """Replace the numbers by ``source``; where they cannot be packed, the weight becomes float32 and says so."""
        source = memory_layout.plain(source.detach().expand(self.shape))
        if isinstance(source, HalfWeight):
            source = source.memory()
        with torch.no_grad(), torch.inference_mode(False):
            if self.store.held:
                whole = self.store.half
                assert whole is not None
                wide = whole.float()
                (wide if self.region is None else self.region.of(wide)).copy_(source)
                if self.store.repack(wide):
                    self.store.show(wide)
                    return self
                materialize.dissolve(self, NOT_PACKED)
            materialize.alias(self).copy_(source)
        return self

    def hand_out(self) -> Tensor:
        """Return the numbers in bfloat16, for a state dict; what is written there arrives when they are next used."""
        if not self.store.held:
            return self.memory()
        whole = self.store.give()
        return whole if self.region is None else self.region.of(whole)


PackedStore.kind = PackedWeight
_SIZES = (Tensor.element_size, Tensor.itemsize.__get__)  # type: ignore[attr-defined]
_BYTES = Tensor.nbytes.__get__  # type: ignore[attr-defined]


def _operand(matrix: PackedMatrix, view: Tensor) -> PackedMatrix | PackedExperts | None:
    """Return the rows of ``matrix`` that ``view``, a look at all of its numbers in their order, stands for."""
    if view.dim() == 3:
        return _experts(matrix, view)
    if view.dim() != 2 or not view.numel():
        return None
    transposed = view.stride(0) == 1 and view.shape[0] == matrix.columns and view.shape[1] > 1
    count, columns = view.shape[::-1] if transposed else view.shape
    first, rest = divmod(int(view.storage_offset()), matrix.columns)
    steps = view.stride()[::-1] if transposed else view.stride()
    if columns != matrix.columns or rest or (count > 1 and steps[0] != columns) or (columns > 1 and steps[1] != 1):
        return None
    found = matrix.narrow_rows(first, count)
    return found.t() if transposed else found


def _experts(matrix: PackedMatrix, view: Tensor) -> PackedExperts | None:
    """As `_operand`, for one matrix per expert."""
    experts = len(view)
    flat = _operand(matrix, view[0]) if view.numel() else None
    if not isinstance(flat, PackedMatrix) or (experts > 1 and view.stride(0) != flat.count * flat.columns):
        return None
    whole = matrix.narrow_rows(flat.begin, flat.count * experts)
    return PackedExperts(whole, experts, flat.transposed)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return ``tensor`` (two dimensions or more, contiguous) as the matrix that is packed: in rows of 64 and longer."""
    if tensor.dim() > 2 and tensor.shape[-1] < RECORD:
        return tensor.reshape(len(tensor), -1)
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def packed_size(tensor: Tensor, escapes: int) -> int:
    """Return the bytes that ``tensor`` takes when it is packed."""
    rows, columns = as_matrix(tensor).shape
    return packed.size_of(rows, columns, escapes)


def fitting(tensor: Tensor, storage: str) -> tuple[Born | None, str]:
    """Return what packing ``tensor`` needs to know, or None and why it goes to 16 bits under ``storage``."""
    if tensor.dtype not in _PACKED_FROM or not tensor.is_contiguous() or tensor.dim() < 2 or not tensor.numel():
        return None, "not packed: its memory is not contiguous" if tensor.dtype in _PACKED_FROM else "not packed"
    found = packed.examine(as_matrix(tensor))
    if not found.exact:
        return None, "not packed: bfloat16 does not have its numbers"
    if packed_size(tensor, found.escapes) >= 2 * tensor.numel():
        return None, "not packed: 16 bits are fewer"
    if storage == "auto" and found.escapes > MOST_ESCAPES * tensor.numel():
        return None, f"not packed: {100 * found.escapes / tensor.numel():.1f} % escapes"
    return found, ""


def packable(tensor: Tensor) -> PackedMatrix | None:
    """Return ``tensor`` packed, or None where that is not possible or 16 bits are fewer."""
    found, _ = fitting(tensor, "packed")
    return None if found is None else packed.pack(as_matrix(tensor), found)


_PACKED_FROM = (torch.bfloat16, torch.float16, torch.float32)
MOST_ESCAPES = 0.003  # of a weight's numbers, under "auto": beyond, looking for them takes the time that packing saves


def parameter(matrix: PackedMatrix, shape: tuple[int, ...], fallbacks: Fallbacks, wants_grad: bool) -> PackedWeight:
    """Return a PackedWeight that is also a ``torch.nn.Parameter``."""
    weight = PackedWeight(PackedStore(matrix, shape, fallbacks))
    weight._is_param = True
    weight.wants_grad = wants_grad
    return weight

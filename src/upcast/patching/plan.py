"""What patching would do to each tensor of a model: pure, printable, and what `upcast.patching.engine` carries out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from upcast.core import console, extensions, memory_layout
from upcast.core.pattern import matches
from upcast.core.tensor_ref import TensorRef
from upcast.kernels.rounding import Rounding, measure, survey
from upcast.patching import trainable as learning
from upcast.patching.claims import alone
from upcast.patching.discovery import prepare, refs
from upcast.patching.parts import Part, parts_of, roots_of, took_back
from upcast.policy.policy import check_storage
from upcast.tensor.packed_weight import PackedWeight, fitting, packed_size

CONVERT = "convert"  # rounded to float16
WRAP = "wrap"  # float16 already: used as it is, without a copy
PACK = "pack"  # stored in 12 bits, exactly
SHARE = "share"  # bitwise equal to another weight: one storage for both
UPCAST = "upcast"  # to float32
KEEP = "keep"  # left as it is
IN_FLOAT16 = (CONVERT, WRAP, SHARE)
STORED = (*IN_FLOAT16, PACK)
PACKING = ("packed", "auto")  # storages that pack


@dataclass(frozen=True)
class Change:
    """What happens to one tensor."""

    name: str
    action: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int
    rounding: Rounding

    @property
    def in_float16(self) -> bool:
        """Whether the tensor is stored in float16 afterwards."""
        return self.action in IN_FLOAT16


@dataclass(frozen=True)
class Plan:
    """The changes, one per tensor. Printing it gives a table; tied tensors appear once.

    Attributes:
        model: the name of the model's class.
        changes: one per tensor.
        remarks: what else there is to say, such as which modules keep their own, slower forward and why.

    Examples:
        >>> plan = upcast.plan(torch.nn.Linear(8, 4).eval())
        >>> [change.name for change in plan.changes]
        ['weight', 'bias']
        >>> plan.bytes_before, plan.bytes_after
        (144, 80)
    """

    model: str
    changes: tuple[Change, ...]
    remarks: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed tensors before patching."""
        return sum(change.bytes_before for change in self.changes)

    @property
    def bytes_after(self) -> int:
        """Bytes of all listed tensors after patching."""
        return sum(change.bytes_after for change in self.changes)

    def __str__(self) -> str:
        headers = (
            "tensor",
            "shape",
            "dtype",
            "action",
            "MB before",
            "after",
            "max error",
            "to zero",
            "reason",
        )
        rows = [_row(change) for change in self.changes]
        total = f"{console.megabytes(self.bytes_before)} -> {console.megabytes(self.bytes_after)}"
        return "\n".join([console.table(headers, rows, right=(4, 5, 6, 7)), f"{self.model}: {total}", *self.remarks])

    def in_float32(self) -> dict[str, int]:
        """Return reason -> count for the tensors that are float32 afterwards."""
        reasons: dict[str, int] = {}
        for change in self.changes:
            if change.action not in STORED:
                reasons[change.reason] = reasons.get(change.reason, 0) + 1
        return reasons


def _row(change: Change) -> tuple[str, ...]:
    error = "lossless" if change.rounding.lossless else f"{change.rounding.max_error:.1e}"
    return (
        change.name,
        "x".join(map(str, change.shape)),
        str(change.dtype).removeprefix("torch."),
        change.action,
        f"{change.bytes_before / 1e6:,.3f}",
        f"{change.bytes_after / 1e6:,.3f}",
        error if change.in_float16 else "",
        f"{change.rounding.flushed:,}" if change.in_float16 else "",
        change.reason,
    )


def decide(ref: TensorRef, keep: Sequence[str], upcast_float64: bool) -> tuple[str, str]:
    """Return (action, reason) for a ref, from its kind and shape alone (not from its numbers)."""
    tensor = ref.tensor
    if any(isinstance(module, torch.jit.ScriptModule) for module, _ in ref.owners):
        return KEEP, "compiled by TorchScript"
    if not ref.is_parameter:
        return _decide_buffer(tensor, upcast_float64)
    unsupported = _unsupported(tensor)
    if unsupported:
        return KEEP, unsupported
    if ref.learns:
        return (KEEP if _is_float32(tensor) else UPCAST), "it learns"
    if memory_layout.is_expanded(tensor):
        return _to_float32(tensor), "expanded"
    pattern = next((p for p in keep if matches(ref.name, p)), None)
    if pattern is None and tensor.dim() >= 2:
        return (WRAP, "float16 already") if tensor.dtype == torch.float16 else (CONVERT, "a weight")
    reason = f"matches keep pattern {pattern!r}" if pattern is not None else "a vector"
    return _to_float32(tensor), reason


def _to_float32(tensor: Tensor) -> str:
    return KEEP if _is_float32(tensor) and memory_layout.is_plain(tensor) else UPCAST


def _is_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and not isinstance(tensor, PackedWeight)


def _decide_buffer(tensor: Tensor, upcast_float64: bool) -> tuple[str, str]:
    halves = (torch.float16, torch.bfloat16) + ((torch.float64,) if upcast_float64 else ())
    return (UPCAST, "a buffer") if tensor.dtype in halves and type(tensor) is Tensor else (KEEP, "a buffer")


def _unsupported(tensor: Tensor) -> str:
    if tensor.layout != torch.strided:
        return f"{tensor.layout} layout".replace("torch.", "")
    if tensor.is_quantized or tensor.dtype not in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ):
        return f"stored as {tensor.dtype}".replace("torch.", "")
    if type(tensor) not in (Tensor, nn.Parameter, PackedWeight):  # packed: by a loader, from a file that holds it so
        return f"a {type(tensor).__name__}"
    return ""


def relevant(ref: TensorRef) -> bool:
    """Whether a ref belongs in the table: every parameter, and the buffers that may change."""
    return ref.is_parameter or ref.tensor.dtype in (torch.float16, torch.bfloat16, torch.float64)


def decisions(
    found: Sequence[TensorRef], keep: Sequence[str], look: Callable[[Tensor], Rounding] = survey
) -> Iterator[tuple[TensorRef, str, str, Rounding, TensorRef | None]]:
    """Yield (ref, action, reason, its numbers as ``look`` finds them, alias) for the refs that belong in the table.

    ``look`` is called with what may go to float16, and with one of equal tensors only.
    """
    upcast_float64 = any(ref.is_parameter and ref.tensor.dtype == torch.float64 for ref in found)
    aliases, known = Aliases(), dict[str, Rounding]()
    for ref in filter(relevant, found):
        action, reason = decide(ref, keep, upcast_float64)
        numbers, alias = Rounding(), None
        if action in IN_FLOAT16:
            alias = aliases.find(ref)
            numbers = known[ref.name] = look(ref.tensor) if alias is None else known[alias.name]
            if not numbers.fits:
                (action, reason), alias = _left_in_float32(ref, numbers), None
            elif numbers.escapes is not None and alias is None:
                action, reason = PACK, f"{_bits(ref, numbers):.2f} bits a number, {numbers.escapes:,} escapes"
            elif numbers.unpacked and alias is None:
                reason = f"{reason}, {numbers.unpacked}"
            elif alias is not None:
                action, reason = SHARE, f"equal to {alias.name}"
        yield ref, action, reason, numbers, alias


def _left_in_float32(ref: TensorRef, numbers: Rounding) -> tuple[str, str]:
    found = []
    if numbers.out_of_range:
        found.append(f"{numbers.out_of_range} values beyond 65504")
    if numbers.nonfinite:
        found.append(f"{numbers.nonfinite} values not finite")
    return _to_float32(ref.tensor), " and ".join(found)


def change_of(ref: TensorRef, action: str, reason: str, rounding: Rounding) -> Change:
    """Return the table's row for a ref."""
    tensor, elements = ref.tensor, ref.tensor.numel()
    dtype = tensor.store.before if isinstance(tensor, PackedWeight) else tensor.dtype
    before = elements * dtype.itemsize
    after = {CONVERT: 2 * elements, WRAP: 2 * elements, SHARE: 0, UPCAST: 4 * elements, KEEP: before, PACK: 0}[action]
    if action == PACK:
        after = packed_size(tensor, rounding.escapes or 0)
    return Change(ref.name, action, reason, tuple(tensor.shape), dtype, before, after, rounding)


def _bits(ref: TensorRef, numbers: Rounding) -> float:
    return 8 * packed_size(ref.tensor, numbers.escapes or 0) / ref.tensor.numel()


_ALIKE = 16  # weights that may begin alike and differ


class Aliases:
    """Finds weights that are bitwise equal, so that they can share one storage."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], list[TensorRef]] = {}

    def find(self, ref: TensorRef) -> TensorRef | None:
        """Return an earlier ref with the same bits, if there is one; remember this one otherwise."""
        tensor = ref.tensor
        if isinstance(tensor, PackedWeight):  # its file says which are the same
            known = self._seen.setdefault((tensor.blob.data_ptr(), tensor.region, tensor.shape), [ref])
            return None if known[0] is ref else known[0]
        earlier = self._seen.setdefault((tensor.shape, tensor.dtype, _sample(tensor)), [])
        for other in earlier:
            if _bits_equal(other.tensor, tensor):
                return other
        if len(earlier) < _ALIKE:  # or a file of weights that begin alike would take the square of its size in time
            earlier.append(ref)
        return None


def _sample(tensor: Tensor) -> tuple[float, ...]:
    """A few numbers that tell most weights apart without reading them whole."""
    rows = tensor.detach()[:: max(1, len(tensor) // 8)]
    while rows.dim() > 2:
        rows = rows[:, :1].squeeze(1)
    return tuple(rows[:, :8].flatten().tolist())


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(*(memory_layout.plain(each.detach()).view(integer) for each in (a, b)))


def plan(model: object, *, keep: Sequence[str] = (), trainable: Sequence[str] = (), storage: str = "float16") -> Plan:
    """Return what `upcast.patch` would do to each tensor of ``model``; changes nothing.

    Of what is patched already, the model or parts of it, the plan tells what was done.

    Args:
        model: any module on the CPU, or what else `upcast.patch` accepts.
        keep: patterns of parameter or module names to hold in float32 (``*`` and ``?`` as in file names).
        trainable: as for `upcast.patch`.
        storage: as for `upcast.patch`.

    Raises:
        UpcastError: as `upcast.patch` would.

    Examples:
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> plan = upcast.plan(model, keep=["weight"])
        >>> print(plan)
        tensor  shape  dtype  action ...
        >>> model.weight.dtype  # nothing has been changed
        torch.float32
    """
    check_storage(storage)
    took_back(model)
    keep = (*keep, "*") if storage == "float32" else keep
    return alone(roots_of(model).values(), lambda: _plan(model, keep, trainable, looking(storage)), reads=True)


Look = Callable[[Tensor], Rounding]


def looking(storage: str) -> Look:
    """Return what says of a tensor what ``storage`` makes of its numbers."""
    if storage not in PACKING:
        return measure

    def look(tensor: Tensor) -> Rounding:
        found, why = fitting(tensor.detach(), storage)
        return Rounding(escapes=found.escapes) if found else replace(measure(tensor), unpacked=why)

    return look


def _plan(model: object, keep: Sequence[str], trainable: Sequence[str], look: Look) -> Plan:
    done = parts_of(model)
    if done:
        return _of_parts(model, done, keep, trainable, look)
    changes: list[Change] = []
    remarks: list[str] = []
    roots = roots_of(model)
    names = {root: name for name, root in reversed(roots.items())}  # components may share one: its first name
    for root in dict.fromkeys(roots.values()):
        _, found = prepare(root, keep, trainable)
        changes += [_under(names[root], change) for change in _changes(found, keep, look)]
        remarks += [*learning.remarks(root, found), *extensions.remarks(root)]
    whole = next(iter(roots.values())) if "" in roots else model
    return Plan(type(whole).__name__, tuple(changes), tuple(dict.fromkeys(remarks)))


def _changes(found: Sequence[TensorRef], keep: Sequence[str], look: Look) -> tuple[Change, ...]:
    return tuple(change_of(*decision[:4]) for decision in decisions(found, keep, look))


def _of_parts(model: object, parts: Sequence[Part], keep: Sequence[str], trainable: Sequence[str], look: Look) -> Plan:
    """Return what was done to the parts that are patched, and what `patch` would do to each of the others alone."""
    roots = roots_of(model)
    changes = [_under(part.name, change) for part in parts for change in part.record.plan.changes]
    inside = {id(ref.tensor) for part in parts for ref in refs(part.module)}
    for name, root in roots.items():
        rest = [ref for ref in refs(root) if id(ref.tensor) not in inside]
        learning.mark(root, rest, trainable)
        changes += [_under(name, change) for change in _changes(rest, keep, look)]
    said = tuple(line for part in parts for line in part.record.plan.remarks)
    listed = ", ".join(part.name or type(part.module).__name__ for part in parts)
    return Plan(type(model).__name__, tuple(changes), (*said, f"patched already: {listed}"))


def _under(prefix: str, change: Change) -> Change:
    return replace(change, name=f"{prefix}.{change.name}") if prefix else change

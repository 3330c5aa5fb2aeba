"""What the passes of a diagnosis note: the range of every operation's numbers, and which operation breaks them.

The pass in float32 notes how large the numbers get; the one in plain float16 compares. Only a few hundred numbers of
each result are kept between the two.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upcast import kernels
from upcast.kernels.reference import FLOAT16_MAX, TINY
from upcast.policy import op_classes
from upcast.policy.mode import STORED, Session, mark_of, reported
from upcast.policy.policy import CLASSES
from upcast.tensor.half_weight import HalfWeight

KEPT = 256  # numbers of each result that are kept for comparison
ROWS = 1024  # results of one pass, at first
MASK = 1e30  # numbers beyond it are no scores but masks, which are filled with the type's own lowest
AT_ONCE = 1 << 20  # scores that may be in memory at once

_MOVES = frozenset(
    name
    for reason in ("looks at the same numbers, moves or selects them", "makes a tensor", "orders, compares or counts")
    for name in op_classes.LEFT_OUT[reason].split()
)
_LARGEST = "_upcast_largest"  # attribute: the largest magnitude of a tensor in the float32 pass
_DRIFT = "_upcast_drift"  # attribute: how far a tensor is from float32's in the float16 pass
_WORDS = {
    "linear": "linear output",
    "norm": "norm output",
    "softmax": "softmax, exponential or loss",
    "scores": "scores",
    "residual": "residual sum",
    "activation": "activation output",
}


@dataclass
class OpStats:
    """One operation of one module, over all calls and samples.

    Attributes:
        module: the module's dotted name ("" for the model itself).
        op_class: a key of `upcast.policy.policy.CLASSES`, or None for what belongs to no class.
        function: torch's name of it.
        order: its place in the order of execution.
        largest: largest magnitude of its results in float32 (of attention: of the scores inside).
        largest_input: largest magnitude of what it gets.
        flushed: share of its results that are not zero and would be zero in float16.
        nonfinite: numbers that are not finite in plain float16, and are in float32.
        drift: relative error of its results in plain float16, over sampled numbers.
    """

    module: str
    op_class: str | None
    function: str
    order: int
    largest: float = 0.0
    largest_input: float = 0.0
    flushed: float = 0.0
    nonfinite: int = 0
    drift: float = 0.0

    @property
    def headroom(self) -> float:
        """Bits between the largest magnitude and 65504; negative where float16 overflows."""
        return math.log2(FLOAT16_MAX / self.largest) if self.largest else math.inf

    @property
    def what(self) -> str:
        """The operation in words."""
        return f"{self.op_class} ({self.function})" if self.op_class else self.function


@dataclass
class Culprit:
    """The first operation that makes (not passes on) a number that is not finite, or drifts beyond the tolerance."""

    module: str
    op_class: str | None
    function: str
    largest: float
    drift: float
    overflows: bool

    def __str__(self) -> str:
        words = _WORDS.get(self.op_class or "", f"result of {self.function}")
        where = self.module or "(the model itself)"
        if not self.overflows:
            return f"{where}: {words} differs from float32's by {self.drift:.1%}"
        if self.largest > FLOAT16_MAX:
            return f"{where}: {words} {self.largest:,.0f} > {FLOAT16_MAX:,.0f}"
        return f"{where}: {words} ({self.function}) is not finite in float16, {self.largest:,.0f} in float32"


Key = tuple[str, str, int]  # module, function, which of its calls


class Noted(NamedTuple):
    """What the float32 pass kept of one result: the row of its sample, and figures of all its numbers."""

    row: int
    size: int
    nonfinite: int
    largest: float


class RangeObserver:
    """What the two passes note."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.sites: dict[tuple[str, str | None, str], OpStats] = {}
        self.culprit: Culprit | None = None
        self.first_nonfinite = ""
        self._numbers = torch.empty(ROWS, KEPT, dtype=torch.float32)  # a row per result
        self.next_sample()

    def next_sample(self) -> None:
        """Forget what belonged to one sample."""
        self._kept: dict[Key, Noted] = {}
        self._rows = 0
        self._calls: tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]] = ({}, {})
        self._drifted: Culprit | None = None

    def in_float32(self, session: Session, op_class: str | None, name: str, tensors: list[Tensor], result: Any) -> None:
        """Note range and a few numbers of one operation's results."""
        entering = _entering(tensors, _LARGEST)
        if _moves(name):
            return _pass_on(result, _LARGEST, entering)
        module = session.frames[-1].name
        for value in _floats(result):
            row = self._row()
            numbers = kernels.look(value, _step(value), self._numbers, row)
            largest = numbers.largest if numbers.largest < MASK else _unmasked(value)
            _note(value, _LARGEST, largest)
            if numbers.nonfinite and not self.first_nonfinite and not any(map(_broken, tensors)):
                self.first_nonfinite = f"{module or '(the model itself)'}: {op_class or name}"
            site = self._site(module, op_class, name)
            inner = _scores_inside(name, tensors)
            if reported(value) == torch.float16:  # what the model itself computes in float32 has its range
                site.largest = max(site.largest, largest, inner)
                site.flushed = max(site.flushed, numbers.flushed / value.numel())
            if entering > site.largest_input and any(reported(t) == torch.float16 for t in tensors):
                site.largest_input = entering
            noted = Noted(row, value.numel(), numbers.nonfinite, max(largest, inner))
            self._kept[self._key(0, module, name)] = noted
        return None

    def in_float16(self, session: Session, op_class: str | None, name: str, tensors: list[Tensor], result: Any) -> None:
        """Compare one operation's results with what the float32 pass noted."""
        entering = _entering(tensors, _DRIFT)
        if _moves(name):
            return _pass_on(result, _DRIFT, entering)
        module = session.frames[-1].name
        for value in _floats(result):
            noted = self._kept.pop(self._key(1, module, name), None)
            if noted is None or noted.size != value.numel():  # the passes took different ways
                _note(value, _DRIFT, entering)
                continue
            nonfinite, off, size = kernels.compare(value, _step(value), self._numbers, noted.row, MASK)
            bad = nonfinite - noted.nonfinite
            drift = math.inf if bad > 0 else math.sqrt(off / max(size, TINY**2 * min(KEPT, noted.size)))
            _note(value, _DRIFT, drift)
            self._note(self._site(module, op_class, name), bad, drift, entering, noted.largest)
        return None

    def _row(self) -> int:
        """Return a row for the sample of one more result; there are twice as many rows once they are full."""
        self._rows += 1
        if self._rows > len(self._numbers):
            self._numbers = torch.cat((self._numbers, torch.empty_like(self._numbers)))
        return self._rows - 1

    def _note(self, site: OpStats, bad: int, drift: float, entering: float, largest: float) -> None:
        site.nonfinite += max(bad, 0)
        if bad <= 0:
            site.drift = max(site.drift, drift)
        if bad > 0 and (self.culprit is None or not self.culprit.overflows):
            self.culprit = Culprit(site.module, site.op_class, site.function, largest, drift, True)
        elif bad <= 0 and drift > self.tolerance and entering < drift / 2 and self.culprit is None:
            self.culprit = Culprit(site.module, site.op_class, site.function, largest, drift, False)

    def reach(self, op_class: str) -> float:
        """Return the largest magnitude that operations of a class make or get in float32."""
        sites = [site for site in self.sites.values() if site.op_class == op_class]
        return max((max(site.largest, site.largest_input) for site in sites), default=0.0)

    def ranked(self) -> list[str]:
        """Return the op classes, those first that most likely have to be upcast: by culprit, reach, drift."""

        def rank(op_class: str) -> tuple[bool, float, float]:
            drift = max((site.drift for site in self.sites.values() if site.op_class == op_class), default=0.0)
            first = self.culprit is not None and self.culprit.op_class == op_class
            return (not first, -max(self.reach(op_class) / FLOAT16_MAX, 1.0), -drift)

        return sorted(CLASSES, key=rank)

    def beyond(self) -> set[str]:
        """Return the classes that reach beyond 65504."""
        return {op_class for op_class in CLASSES if self.reach(op_class) > FLOAT16_MAX}

    def _site(self, module: str, op_class: str | None, name: str) -> OpStats:
        key = (module, op_class, name)
        if key not in self.sites:
            self.sites[key] = OpStats(module, op_class, name, len(self.sites))
        return self.sites[key]

    def _key(self, which: int, module: str, name: str) -> Key:
        calls = self._calls[which]
        calls[module, name] = calls.get((module, name), -1) + 1
        return module, name, calls[module, name]


@functools.lru_cache(maxsize=4096)
def _moves(name: str) -> bool:
    """Whether a function makes no numbers of its own: it moves them, or makes a tensor for others to fill."""
    return name in _MOVES or (name not in op_classes.CLASS_OF and name not in op_classes.ALL_LEFT_OUT)


def _note(value: Tensor, name: str, number: float) -> None:
    """Leave a number on an activation; parameters and buffers, which outlive the pass, get none."""
    if mark_of(value) != STORED:
        value.__dict__[name] = number


def _pass_on(result: Any, name: str, number: float) -> None:
    for value in _floats(result):
        _note(value, name, number)


def _entering(tensors: list[Tensor], name: str) -> float:
    """Return the largest of the numbers that were left on an operation's inputs."""
    largest = 0.0
    for tensor in tensors:
        if type(tensor) is not HalfWeight:
            largest = max(largest, getattr(tensor, name, 0.0))
    return largest


def _floats(result: Any) -> list[Tensor]:
    """Return the floating-point activations among an operation's results."""
    if isinstance(result, Tensor):
        usable = type(result) is not HalfWeight and result.is_floating_point() and result.numel()
        return [result] if usable else []
    return [value for each in result for value in _floats(each)] if isinstance(result, (tuple, list)) else []


def all_finite(value: Tensor) -> bool:
    """Whether all numbers are finite, in one pass and without a copy."""
    return not value.numel() or all(math.isfinite(bound) for bound in torch.aminmax(value.detach()))


def _broken(tensor: Tensor) -> bool:
    """Whether an activation has numbers that are not finite."""
    if isinstance(tensor, HalfWeight) or not tensor.is_floating_point() or mark_of(tensor) == STORED:
        return False
    return kernels.survey(tensor).nonfinite > 0


def _unmasked(value: Tensor) -> float:
    """Return the largest magnitude beside what masks out: a sum with the lowest number is no overflow in float16."""
    kept = value.detach()
    kept = kept[kept > -MASK]
    return kernels.survey(kept).largest if kept.numel() else 0.0


def _step(value: Tensor) -> int:
    """Return how far apart the KEPT numbers of a sample are, evenly spread over rows and columns."""
    return _coprime(value.numel(), value.shape[-1] if value.dim() else 1)


@functools.lru_cache(maxsize=4096)
def _coprime(total: int, width: int) -> int:
    """Return a step that is no multiple of the rows' width, or the sample would see few columns."""
    return next(step for step in range(max(1, total // KEPT), 0, -1) if math.gcd(step, width) == 1)


def _scores_inside(name: str, tensors: list[Tensor]) -> float:
    """Return the largest magnitude of q k / sqrt(d) inside a fused attention, which shows only its result."""
    if name != "scaled_dot_product_attention" or len(tensors) < 3:
        return 0.0
    q, k = tensors[0].detach().float(), tensors[1].detach().float()
    if q.dim() != 4 or k.dim() != 4:
        return kernels.survey(q @ k.mT).largest / math.sqrt(q.shape[-1])
    batch, width = q.shape[0], q.shape[-1]
    rows = q.reshape(batch, k.shape[1], -1, width)  # the heads of a group share their keys
    step = max(1, AT_ONCE // max(1, batch * k.shape[1] * k.shape[2]))
    return max(kernels.survey(part @ k.mT).largest for part in rows.split(step, dim=2)) / math.sqrt(width)

"""Where a model would overflow float16, before it does, and which operation breaks it.

One pass in float32 notes for every operation of every module how large its numbers get; one pass in plain float16
finds the first operation that makes a number that is not finite, or drifts away (`upcast.analysis.range_observer`).
Here are the two passes and the report: a table, a picture, JSON and a suggested policy.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from upcast.analysis.range_observer import Culprit, OpStats, RangeObserver, all_finite
from upcast.analysis.result import Result, Table
from upcast.analysis.runner import NONE, PolicyRunner, Sample, Samples, answer, progress, trial
from upcast.core.errors import UpcastError
from upcast.kernels.portable import CHUNK
from upcast.kernels.reference import FLOAT16_MAX
from upcast.policy import fingerprint
from upcast.policy.policy import Policy

SHOWN = 20  # rows of the printed table
_SMALL = 1e-20  # of a sum of squares: below, some may have become zero in float32
MARGIN = 1.0  # bits of headroom that the suggested policy asks for


@dataclass
class Diagnosis(Result):
    """What `diagnose` found. Printing it gives a table, worst first.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> found = upcast.diagnose(model, torch.randn(2, 8))
        >>> [site.op_class for site in found.worst(1)]
        ['norm']
    """

    model: str
    architecture: dict[str, Any]
    sites: list[OpStats]
    culprit: Culprit | None
    finite: bool  # whether plain float16 gives a finite result
    error: float  # of plain float16's result, relative to float32's (NaN if not finite)
    tolerance: float
    passes: int
    policy: Policy = field(default_factory=Policy)

    def worst(self, count: int) -> list[OpStats]:
        """Return the sites with the least headroom, worst first."""
        return sorted(self.sites, key=lambda site: (-site.largest, site.order))[:count]

    def _title(self) -> str:
        return f"{self.model}: culprit: {self.culprit or 'none'}"

    def _table(self) -> Table:
        rows = [_row(site) for site in self.worst(SHOWN)]
        return Table(("module", "operation", "largest", "headroom", "to zero", "float16"), rows, right=(2, 3, 4))

    def _end(self) -> str:
        rest = len(self.sites) - SHOWN
        more = f"... and {rest} more operations\n" if rest > 0 else ""
        found = f"finite, relative error {self.error:.1e}" if self.finite else "NOT FINITE"
        return f"{more}plain float16: {found}\nsuggested policy: {self.policy}"

    def _content(self) -> dict[str, Any]:
        sites = [{**asdict(site), "headroom_bits": site.headroom} for site in self.sites]
        return {**asdict(self), "policy": str(self.policy), "sites": sites}

    def _draw(self, path: Path) -> None:
        from upcast.analysis import plots

        plots.headroom(self, path)


def diagnose(model: object, inputs: Any = None, *, tolerance: float = 0.1, **kwargs: Any) -> Diagnosis:
    """Say where ``model`` comes close to float16's end, and which operation plain float16 breaks.

    Args:
        model: any module on the CPU, patched or not; afterwards it is as it was.
        inputs: one sample or an iterable of samples, as for `upcast.search`; None: ``kwargs`` are the sample.
        tolerance: relative error of one operation's result beyond which it has drifted.
        kwargs: keyword arguments of every sample.

    Raises:
        UpcastError: no inputs, or on another device; the model is in training mode with dropout, fails in float32
            already, or its result in float32 is not finite (the message names where).

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> found = upcast.diagnose(model, torch.randn(2, 8))
        >>> found.finite, found.culprit
        (True, None)
        >>> print(found)
        Sequential: ...
    """
    with trial(model) as run:
        found = RangeObserver(tolerance)
        errors, sound = [], True
        samples = Samples(inputs, kwargs)
        with progress(run, 2 * samples.count(), "diagnose"):
            for sample in samples:
                reference = run.finite_reference(sample, found.in_float32)
                got = _in_float16(run, sample, found)
                sound = sound and got is not None and all_finite(got)
                if got is not None:
                    errors.append(relative_error(got, reference))
                    found.next_sample()
        root = run.root
        sites = list(found.sites.values())
        error = max(errors) if sound and errors else math.nan
        return Diagnosis(
            type(root).__name__,
            fingerprint.of(root),
            sites,
            found.culprit,
            sound,
            error,
            tolerance,
            run.passes,
            suggested(sites, found.culprit),
        )


def _in_float16(run: PolicyRunner, sample: Sample, found: RangeObserver) -> Tensor | None:
    """Return what plain float16 gives, or None where it fails for what is not finite."""
    try:
        return answer(run.run(NONE, sample, found.in_float16))
    except (RuntimeError, ValueError, IndexError) as problem:  # NaN where an index or a probability is due
        if found.culprit is None:
            raise UpcastError(f"plain float16 fails for another reason than its range: {problem}") from problem
        return None


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference relative to the norm of ``want``, which is float32."""
    off = size = 0.0
    pieces = zip(got.detach().reshape(-1).split(CHUNK), want.detach().reshape(-1).split(CHUNK), strict=True)
    for a, b in pieces:  # no copy of the whole
        off += _squares(a.float() - b)
        size += _squares(b)
    return math.sqrt(off) / max(math.sqrt(size), 1e-30)


def _squares(piece: Tensor) -> float:
    """Return the sum of the squares, in double where float32 does not hold it (several times slower)."""
    found = float(piece.dot(piece))
    return found if math.isfinite(found) and found > _SMALL else float(piece.double().square().sum())


def suggested(sites: list[OpStats], culprit: Culprit | None = None) -> Policy:
    """Return the culprit's class, and those whose results, or whose inputs, come within a bit of float16's end."""
    limit = FLOAT16_MAX / 2**MARGIN
    needed = {site.op_class for site in sites if max(site.largest, site.largest_input) > limit}
    needed.add(culprit.op_class if culprit is not None else None)
    return Policy(frozenset(op_class for op_class in needed if op_class is not None))


# --- showing ----------------------------------------------------------------------------------------------------------


def _row(site: OpStats) -> tuple[str, ...]:
    state = f"{site.nonfinite:,} not finite" if site.nonfinite else f"error {site.drift:.1e}"
    headroom = f"{site.headroom:+.1f} bits" if site.largest else ""
    return (site.module or "(model)", site.what, f"{site.largest:,.6g}", headroom, f"{site.flushed:.1%}", state)

"""Each op class upcast alone, and each dropped alone: what that does to a model's result."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcast.analysis.diagnose import relative_error
from upcast.analysis.range_observer import all_finite
from upcast.analysis.result import Result, Table
from upcast.analysis.runner import PolicyRunner, Sample, Samples, answer, progress, trial
from upcast.policy import fingerprint
from upcast.policy.policy import ALL, CLASSES, PRESETS, Policy


@dataclass(frozen=True)
class Row:
    """One policy's result, relative to float32's (the worst sample's; NaN if it is not finite)."""

    label: str
    policy: Policy
    op_class: str  # the one upcast or dropped alone; "" for presets
    dropped: bool
    finite: bool
    error: float


@dataclass(frozen=True)
class Ablation(Result):
    """The rows of an ablation. Printing it gives a table.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> found = upcast.ablate(model, torch.randn(2, 8))
        >>> all(row.finite for row in found.rows)
        True
        >>> text = found.to_json("ablation.json")
    """

    model: str
    architecture: dict[str, Any]
    rows: tuple[Row, ...]

    def _title(self) -> str:
        return f"{self.model}: one op class alone, or all but one"

    def _table(self) -> Table:
        rows = [(r.label, "yes" if r.finite else "NO", f"{r.error:.1e}" if r.finite else "") for r in self.rows]
        return Table(("upcast", "finite", "error"), rows, right=(2,))

    def _content(self) -> dict[str, Any]:
        rows = [{**vars(row), "policy": str(row.policy)} for row in self.rows]
        return {**vars(self), "rows": rows}

    def _draw(self, path: Path) -> None:
        from upcast.analysis import plots

        bars = [plots.Bar(row.label, row.error, row.op_class, faint=row.dropped) for row in self.rows]
        plots.errors(bars, self._title(), path)


def ablate(model: object, inputs: Any = None, *, extra: tuple[str, ...] = (), **kwargs: Any) -> Ablation:
    """Return finite or not and the error for each op class upcast alone, dropped alone, and for the presets.

    Args:
        model: any module on the CPU, patched or not; afterwards it is as it was.
        inputs: one sample or an iterable of samples, as for `upcast.search`; None: ``kwargs`` are the sample.
        extra: further policy strings to measure.
        kwargs: keyword arguments of every sample.

    Raises:
        UpcastError: as `upcast.diagnose`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> print(upcast.ablate(model, torch.randn(2, 8)))
        Sequential: ...
    """
    with trial(model) as run:
        policies = _policies(extra)
        errors = [0.0] * len(policies)  # the worst sample's, infinite where a result was not
        samples = Samples(inputs, kwargs)
        with progress(run, (1 + len(policies)) * samples.count(), "ablate"):
            for sample in samples:  # one at a time, under all policies
                reference = run.finite_reference(sample)
                found = [_error(run, policy, sample, reference) for _, policy, *_ in policies]
                errors = list(map(max, errors, found))
                del sample, reference  # before the next one is made
        rows = [
            Row(*each, math.isfinite(error), error if math.isfinite(error) else math.nan)
            for each, error in zip(policies, errors, strict=True)
        ]
        return Ablation(type(run.root).__name__, fingerprint.of(run.root), tuple(rows))


def _policies(extra: tuple[str, ...]) -> list[tuple[str, Policy, str, bool]]:
    chosen = [("nothing (none)", Policy(PRESETS["none"]), "", False)]
    chosen += [(f"{name} alone", Policy(frozenset({name})), name, False) for name in CLASSES]
    chosen += [(f"all but {name}", Policy(ALL - {name}), name, True) for name in CLASSES]
    chosen += [(text, Policy.parse(text), "", False) for text in ("sensitive", *extra)]
    return [*chosen, ("everything (safe)", Policy(), "", False)]


def _error(run: PolicyRunner, policy: Policy, sample: Sample, reference: Any) -> float:
    try:
        got = answer(run.run(policy, sample))
    except (RuntimeError, ValueError, IndexError):  # NaN where an index or a probability is due
        return math.inf
    return relative_error(got, reference) if all_finite(got) else math.inf

"""The smallest policy whose result is finite and close enough to float32's, found by measurement.

First the diagnosis ranks the op classes by how far beyond float16 they reach; `smallest` finds the set of them that is
needed. What is left is narrowed to module patterns, by halving the depth.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from upcast.analysis.diagnose import relative_error
from upcast.analysis.range_observer import Culprit, RangeObserver, all_finite
from upcast.analysis.result import Result, Table
from upcast.analysis.runner import NONE, SAFE, PolicyRunner, Sample, Samples, answer, progress, trial
from upcast.analysis.smallest import smallest
from upcast.core import messages
from upcast.core.errors import UpcastError
from upcast.core.module_tree import named_modules
from upcast.policy import fingerprint
from upcast.policy.mode import Observer
from upcast.policy.policy import ALL, Policy

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Step:
    """One policy that was tried: whether its result was finite, and its error by the metric (the worst sample's)."""

    policy: str
    finite: bool
    error: float
    decision: str


@dataclass(frozen=True)
class SearchResult(Result):
    """A policy and its evidence. ``upcast.patch`` takes it as it is, and as the path that `to_json` wrote.

    Attributes:
        policy: the smallest sufficient policy.
        error: its error by the metric, the worst sample's.
        tolerance: what was allowed.
        architecture: the fingerprint of the model it was measured on.
        culprit: what breaks plain float16, in words.
        passes: forward passes that the search took, over all samples.
        steps: every policy tried, in order.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> found = upcast.search(model, torch.randn(2, 8), tolerance=1e-2)
        >>> str(found.policy)
        'none'
        >>> text = found.to_json("policy.json")
        >>> upcast.patch(model, policy="policy.json") is model
        True
    """

    policy: Policy
    error: float
    tolerance: float
    architecture: dict[str, Any]
    culprit: str
    passes: int
    samples: int
    steps: tuple[Step, ...] = field(repr=False)

    def _title(self) -> str:
        return f"policy {self.policy}: error {self.error:.1e} (tolerance {self.tolerance:g}), {self.passes} passes"

    def _table(self) -> Table:
        rows = [(s.policy, f"{s.error:.1e}" if s.finite else "not finite", s.decision) for s in self.steps]
        return Table(("policy", "error", "decision"), rows, right=(1,))

    def _end(self) -> str:
        return f"culprit: {self.culprit}"

    def _content(self) -> dict[str, Any]:
        return {**vars(self), "policy": str(self.policy), "steps": [vars(step) for step in self.steps]}

    def _draw(self, path: Path) -> None:
        from upcast.analysis import plots

        bars = [plots.Bar(step.policy, step.error if step.finite else math.nan) for step in self.steps]
        plots.errors(bars, self._title(), path, self.tolerance)


def search(
    model: object,
    inputs: Any = None,
    *,
    tolerance: float = 1e-2,
    metric: Metric | None = None,
    modules: bool = True,
    verbose: bool = True,
    **kwargs: Any,
) -> SearchResult:
    """Return the smallest policy whose result is finite and within ``tolerance`` of float32's.

    Args:
        model: any module on the CPU, patched or not; afterwards it is as it was.
        inputs: one sample (a tensor, a mapping of keyword arguments, a tuple of positional ones), or what gives samples
            each time it is iterated, the same ones in the same order: a list, a Dataset, a DataLoader. One sample is
            held at a time. Of float32's results only the first sample's is kept; the others' are computed again for
            every policy that gets that far, which is one more pass each, and needs neither memory nor disk. None:
            ``kwargs`` are the sample.
        tolerance: the largest error allowed.
        metric: (output, float32's output) -> error, of the model's outputs as they are; by default the relative error
            of the logits (or of the first floating-point tensor).
        modules: narrow the classes to the modules that need them.
        verbose: say a line per decision (to standard error).
        kwargs: keyword arguments of every sample.

    Raises:
        UpcastError: as `upcast.diagnose`; where even float32 math on float16 weights misses the tolerance; inputs that
            can be iterated only once, as a generator, or that a DataLoader shuffles.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)).eval()
        >>> found = upcast.search(model, torch.randn(2, 8), tolerance=1e-2)
        >>> found.error <= found.tolerance
        True
        >>> upcast.patch(model, policy=found) is model
        True
    """
    with trial(model) as run:
        samples = Samples(inputs, kwargs)
        judge = _Judge(run, samples, tolerance, metric, verbose)
        with progress(run, _GUESS * samples.count(), "search"):
            policy = judge.classes()
            if modules and policy.classes and policy.classes != ALL:
                policy = judge.modules(policy)
            return judge.found(policy)


_GUESS = 12  # passes of a search, about: the progress bar goes by it


class _Judge:
    """Tries policies, remembers the results, decides."""

    def __init__(
        self, run: PolicyRunner, data: Iterable[Sample], tolerance: float, metric: Metric | None, verbose: bool
    ) -> None:
        self.run, self.data, self.tolerance, self.metric, self.verbose = run, data, tolerance, metric, verbose
        self.findings = RangeObserver(math.inf)
        self.results: dict[Policy, tuple[bool, float]] = {}
        self.steps: list[Step] = []
        self.first: Any = None  # float32's answer to the first sample; for a metric of the user, the whole output
        self.samples = 0  # seen so far

    # --- measuring ---

    def passes(self, policy: Policy, decision: str, observer: Observer | None = None) -> bool:
        """Whether every sample's result under ``policy`` is finite and within the tolerance."""
        if policy not in self.results:
            self.results[policy] = finite, error = self._measure(policy, observer)
            enough = finite and error <= self.tolerance
            self.steps.append(Step(str(policy), finite, error, decision + (": enough" if enough else ": not enough")))
            if self.verbose:
                shown = f"error {error:.1e}" if finite else "not finite"
                messages.say(f"search: {policy}: {shown} ({self.steps[-1].decision})")
        finite, error = self.results[policy]
        return finite and error <= self.tolerance

    def _measure(self, policy: Policy, observer: Observer | None) -> tuple[bool, float]:
        """Return (finite, the worst sample's error), of as many samples as it takes to refuse."""
        worst, seen = 0.0, 0
        for sample in self.data:
            reference = self.first if seen == 0 else self._reference(sample, seen)
            error = self._error(policy, sample, reference, observer if seen == 0 else None)
            seen += 1  # noqa: SIM113 (enumerate would hold on to the sample)
            self.samples = max(self.samples, seen)
            del sample, reference  # before the next sample is made
            if not math.isfinite(error):  # one sample is enough to refuse
                return False, math.inf
            worst = max(worst, error)
            if worst > self.tolerance:
                break
        return True, worst

    def _error(self, policy: Policy, sample: Sample, reference: Any, observer: Observer | None) -> float:
        """Return one sample's error; infinity where the result is not finite."""
        try:
            output = self.run.run(policy, sample, observer)
        except UpcastError:
            raise
        except (RuntimeError, ValueError, IndexError):  # NaN where an index or a probability is due
            return math.inf
        if self.metric is not None:
            return float(self.metric(output, reference))
        got = answer(output)
        return relative_error(got, reference) if all_finite(got) else math.inf

    def _reference(self, sample: Sample, index: int) -> Any:
        """Run float32 on a sample; the first one's ranges rank the classes."""
        observer = self.findings.in_float32 if index == 0 else None
        if self.metric is not None:
            return self.run.reference(sample, observer)
        return self.run.finite_reference(sample, observer, f" (sample {index + 1})")

    # --- classes ---

    def classes(self) -> Policy:
        """Return the smallest sufficient set of op classes."""
        self.first = self._reference(next(iter(self.data)), 0)
        if self.passes(NONE, "plain float16", self.findings.in_float16):
            return NONE
        chosen = smallest(self.findings.ranked(), self.findings.beyond(), lambda c, what: self.passes(Policy(c), what))
        if chosen is not None:
            return Policy(chosen)
        finite, error = self.results[SAFE]
        found = f"an error of {error:.1e}" if finite else "no finite result"
        raise UpcastError(
            f"every class upcast gives {found}; no policy can be better than float32 math on float16 weights. "
            f"Allow more than tolerance={self.tolerance:g}, or keep weights in float32 (storage=float32)."
        )

    # --- modules ---

    def modules(self, policy: Policy) -> Policy:
        """Return ``policy`` confined to the blocks that need it, if it can be: the depth is halved from both ends."""
        blocks = _blocks(self.run)
        if len(blocks) < 2:
            return policy
        low, high = self._first_needed(policy, blocks), len(blocks)
        if low is None:
            return policy
        high = self._last_needed(policy, blocks, low)
        best = _confined(policy, blocks[low:high])
        if (low, high) == (0, len(blocks)) or not self.passes(best, f"only {len(blocks[low:high])} blocks"):
            return policy
        return best

    def _first_needed(self, policy: Policy, blocks: list[str]) -> int | None:
        """Return the largest index from which on upcasting is enough, by bisection; None if even all blocks are not."""
        if not self.passes(_confined(policy, blocks), "only inside blocks"):
            return None
        low, high = 0, len(blocks)  # from low on is enough, from high on (nowhere) is not
        while high - low > 1:
            middle = (low + high) // 2
            if self.passes(_confined(policy, blocks[middle:]), f"from {blocks[middle]} on"):
                low = middle
            else:
                high = middle
        return low

    def _last_needed(self, policy: Policy, blocks: list[str], low: int) -> int:
        enough, short = len(blocks), low
        while enough - short > 1:
            middle = (enough + short) // 2
            if self.passes(_confined(policy, blocks[low:middle]), f"up to {blocks[middle - 1]}"):
                enough = middle
            else:
                short = middle
        return enough

    def found(self, policy: Policy) -> SearchResult:
        """Return the result with its evidence."""
        culprit: Culprit | None = self.findings.culprit
        return SearchResult(
            policy=policy,
            error=self.results[policy][1],
            tolerance=self.tolerance,
            architecture=fingerprint.of(self.run.root),
            culprit=str(culprit or "none"),
            passes=self.run.passes,
            samples=self.samples,
            steps=tuple(self.steps),
        )


def _blocks(run: PolicyRunner) -> list[str]:
    """Return the names of the model's blocks: the list of modules with most of the weights, not a block's experts."""
    lists = [(name, module) for name, module in named_modules(run.root) if isinstance(module, torch.nn.ModuleList)]
    name, modules = max(lists, key=lambda item: _weights(item[1]), default=("", torch.nn.ModuleList()))
    return [f"{name}.{index}" for index in range(len(modules))]


def _weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _confined(policy: Policy, blocks: list[str]) -> Policy:
    """Return ``policy`` inside consecutive blocks only."""
    first, last = blocks[0], blocks[-1].rpartition(".")[2]
    pattern = first if len(blocks) == 1 else f"{first}..{last}"
    return replace(policy, classes=frozenset(), overrides=((pattern, policy.classes),))

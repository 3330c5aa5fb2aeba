"""What a worker is told, and what it answers."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.harness import quality

STRESS_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, once."""

    variant: str
    checkpoint: Path
    scratch: Path  # where float32 leaves its logits for the others
    threads: int | None
    prompt: tuple[int, ...]
    chat: tuple[int, ...]
    windows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Loading:
    """Memory is above what the process held with all libraries imported; None where it cannot be told.

    `bytes_per_token`: of the weights that a decoded token reads; `prompt_operations`: multiplications and additions of
    the weights' products in a prefill that wants the last position's logits. None where a variant does not tell.
    """

    weight_bytes: int
    peak_bytes: int | None
    bytes_per_token: int | None = None
    prompt_operations: int | None = None


@dataclass(frozen=True)
class Sample:
    """One round: `prefill` and `first_token` in seconds, `decode` in seconds per token, and what was said."""

    prefill: float
    decode: float
    first_token: float
    answer: tuple[int, ...]


@dataclass(frozen=True)
class StressOutcome:
    """The stress test at one scale; the error is against float32's unscaled logits, None if not finite."""

    scale: int
    nonfinite_share: float
    relative_error: float | None


@dataclass(frozen=True)
class Failure:
    """What a request died of: one line, and the traceback."""

    reason: str
    details: str


def stress_outcome(scale: int, logits: Tensor, reference: Tensor) -> StressOutcome:
    """Judge the logits of a scaled model, both (positions, vocabulary)."""
    share = quality.nonfinite_share(logits)
    return StressOutcome(scale, share, None if share else quality.relative_error(logits, reference))


def prompt_of(job: Job, length: int) -> tuple[int, ...]:
    """Return ``length`` tokens of the text, over again where it is too short."""
    text = tuple(token for window in job.windows for token in window)
    return (text * (length // len(text) + 1))[:length]


BATCHED = 32  # tokens of each prompt of a batch


def prompts_of(job: Job, size: int) -> list[tuple[int, ...]]:
    """Return ``size`` prompts of `BATCHED` tokens, each beginning one token later in the text."""
    text = prompt_of(job, BATCHED + size)
    return [text[first : first + BATCHED] for first in range(size)]


def spans(times: list[float]) -> tuple[float, float]:
    """Return the seconds of the prompt, and per token after it; ``times``: before the first, and after each token."""
    return times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2)


def next_tokens(windows: Tensor) -> Tensor:
    """The token after each position, -100 after the last of each window; (windows * length,)."""
    following = windows.roll(-1, dims=1)
    following[:, -1] = -100
    return following.flatten()

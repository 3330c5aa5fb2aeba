"""The parent's side: starts one process per variant and interleaves what they measure.

A shared machine drifts by tens of percent within minutes. So no variant is measured in one go: every round
asks each of them for one sample, each round beginning with another one, while the others wait.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import limits
from benchmarks.harness.child import serve
from benchmarks.harness.job import Failure, Job, Loading, Sample, StressOutcome
from benchmarks.harness.quality import Quality
from benchmarks.harness.subject import Subject
from benchmarks.harness.summary import Summary, summarise
from benchmarks.harness.variants import BASELINE

PATIENCE = 600  # seconds for one answer; the slowest, on a large model, takes a tenth of it
# UPCAST=1 would patch the baselines behind the benchmark's back; only the choice of kernels is the user's.
KEPT = "UPCAST_KERNELS"
QUIET = {"UPCAST_VERBOSE": "0"}


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    new_tokens: int  # of the greedy answer that every round gives
    window: int  # tokens of one stretch of text
    windows: int
    scales: tuple[int, ...]


FULL = Effort(7, 40, 512, 2, (4, 64, 1024, 4096))
QUICK = Effort(3, 8, 64, 1, (64,))


class VariantFailed(Exception):
    """A variant could not answer; the message is one line, `details` the traceback."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


@dataclass
class Result:
    """All that is known about one variant; what was not reached before a failure stays empty."""

    variant: str
    failure: str | None = None
    details: str = ""
    threads: int | None = None
    loading: Loading | None = None
    steady_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    quality: Quality | None = None
    stress: list[StressOutcome] = field(default_factory=list)

    def timing(self, name: str) -> Summary | None:
        """Summary of one field of the samples: `prefill`, `decode` or `first_token`, in seconds."""
        return summarise([getattr(sample, name) for sample in self.samples]) if self.samples else None

    @property
    def answer(self) -> tuple[int, ...] | None:
        """The greedy tokens of the first round; `_round` makes sure that all rounds agree."""
        return self.samples[0].answer if self.samples else None

    @property
    def status(self) -> str:
        """`failed`, `non-finite` (in normal use; the stress test is apart) or `ok`."""
        if self.failure is not None:
            return "failed"
        return "non-finite" if self.quality and self.quality.nonfinite_share else "ok"


class Connected:
    """A running worker process and the pipe to it."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=serve, args=(theirs, job), name=job.variant, daemon=True)
        self.process.start()
        theirs.close()

    def send(self, method: str, *arguments: Any) -> None:
        try:
            self.connection.send((method, arguments))
        except BrokenPipeError:
            raise VariantFailed(self._ending()) from None

    def receive(self) -> Any:
        try:
            if not self.connection.poll(PATIENCE):
                raise VariantFailed(f"no answer within {PATIENCE} s")
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise VariantFailed(self._ending()) from None
        if isinstance(answer, Failure):
            raise VariantFailed(answer.reason, answer.details)
        return answer

    def _ending(self) -> str:
        self.process.join(timeout=10)
        code = self.process.exitcode
        return f"its process was killed by signal {-code}" if code and code < 0 else f"its process ended ({code})"

    def close(self) -> None:
        self.connection.close()
        self.process.kill()  # it holds nothing to save, and torch takes a second to leave in good order
        self.process.join()
        self.process.close()


class Rates(NamedTuple):
    """What this machine did at most in each round: bytes read per second, and float32 operations per second."""

    read: list[float]
    multiply: list[float]


class Session:
    """Asks the variants that are still alive, and keeps what they answer or died of."""

    def __init__(self, workers: dict[str, Connected]) -> None:
        self.workers = workers
        self.results = {name: Result(name) for name in workers}
        self.rates = Rates([], [])

    def alive(self) -> list[str]:
        return [name for name, result in self.results.items() if result.failure is None]

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """Return the answer of one variant, or None once it has failed."""
        return self.ask_all([name], method, *arguments)[name]

    def ask_all(self, names: Sequence[str], method: str, *arguments: Any) -> dict[str, Any]:
        """Let all of `names` work at once and return their answers; for what is not timed."""
        for name in names:
            self._attempt(name, method, lambda worker: worker.send(method, *arguments))
        return {name: self._attempt(name, method, Connected.receive) for name in names}

    def _attempt(self, name: str, method: str, step: Callable[[Connected], Any]) -> Any:
        result = self.results[name]
        if result.failure is not None:
            return None
        try:
            return step(self.workers[name])
        except VariantFailed as failed:
            result.failure, result.details = f"{method}: {failed}", failed.details
            return None


def job_for(subject: Subject, variant: str, threads: int | None, scratch: Path) -> Job:
    return Job(variant, subject.checkpoint, scratch, threads, subject.prompt, subject.chat, subject.windows)


@contextmanager
def started(jobs: Sequence[Job]) -> Iterator[Session]:
    """Start all workers, importing their libraries side by side; end them however the block ends."""
    with ExitStack() as stack:
        workers = {}
        with _worker_environment():
            for job in jobs:
                workers[job.variant] = Connected(job)
                stack.callback(workers[job.variant].close)
        yield Session(workers)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """The environment that processes started inside the block inherit; restored after it."""
    before = dict(os.environ)
    try:
        for name in before:
            if name.startswith("UPCAST") and name != KEPT:
                del os.environ[name]
        os.environ.update(QUIET)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


Notice = Callable[[str, float], None]  # what is being done, and the share of the whole that is done


def measure(session: Session, effort: Effort, stressed: bool, notice: Notice) -> dict[str, Result]:
    """Measure every variant of `session`; the stress test only if `stressed`."""
    names = list(session.results)
    notice("Importing the libraries, loading the models", 0.0)
    _load(session, names)
    for share, name in _shares(names, 0.15, 0.25):
        notice(f"Warming up {name}", share)
        session.results[name].steady_bytes = session.ask(name, "warm_up")
    memory = limits.Memory()
    for share, index in _shares(range(effort.rounds), 0.25, 0.65):
        notice(f"Round {index + 1} of {effort.rounds}", share)
        session.rates.read.append(memory.rate())
        if multiplied := limits.multiply_rate():
            session.rates.multiply.append(multiplied)
        _round(session, effort, index)
    del memory
    # float32 leaves the reference that the others are compared with: it goes first.
    for share, name in _shares(sorted(names, key=lambda name: name != BASELINE), 0.65, 1.0):
        notice(f"Logits of {name}", share)
        _judge(session, name, effort, stressed)
    return session.results


def _shares(items: Sequence[Any], begin: float, end: float) -> Iterator[tuple[float, Any]]:
    for index, item in enumerate(items):
        yield begin + (end - begin) * index / len(items), item


def _load(session: Session, names: list[str]) -> None:
    for name, threads in session.ask_all(names, "threads").items():
        session.results[name].threads = threads
    for name, loading in session.ask_all(names, "load").items():
        session.results[name].loading = loading


def _round(session: Session, effort: Effort, index: int) -> None:
    names = session.alive()
    first = index % len(names) if names else 0
    for name in names[first:] + names[:first]:
        result, sample = session.results[name], session.ask(name, "sample", effort.new_tokens)
        if sample is None:
            continue
        result.samples.append(sample)
        if sample.answer != result.answer:
            result.failure = f"round {index + 1} gave another greedy answer than round 1"


def _judge(session: Session, name: str, effort: Effort, stressed: bool) -> None:
    result = session.results[name]
    if session.results[BASELINE].failure is None:
        result.quality = session.ask(name, "quality")
        for scale in effort.scales if stressed else ():
            outcome = session.ask(name, "stress", scale)
            if outcome is not None:
                result.stress.append(outcome)

"""One variant in a process of its own: it loads the model, then measures whatever the parent asks for.

Nothing here decides what is measured or when: the parent interleaves the variants (session.py).
"""

import contextlib
import gc
import importlib
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.generate.base import generate_fn
from torch import Tensor

from benchmarks import memory, quality, stress
from benchmarks.variants import BASELINE, PEERS, VARIANTS, weight_bytes

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
    """Memory is above what the process held with all libraries imported; None where it cannot be told."""

    weight_bytes: int
    peak_bytes: int | None


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


class Worker:
    """Methods are what the parent may ask for; see `serve`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.variant = VARIANTS[job.variant]
        self.prompt, self.chat = torch.tensor(job.prompt), torch.tensor(job.chat)
        self.windows = torch.tensor(job.windows)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if job.variant == "upcast":
            importlib.import_module("upcast")  # an imported library, not part of loading
        # Start torch's thread pool and its matmul library, which belong to no variant's weights.
        torch.nn.functional.linear(torch.ones(256, 256), torch.ones(256, 256))
        self.imported_bytes = memory.resident_bytes() if memory.supported() else None

    def threads(self) -> int:
        return torch.get_num_threads()

    def load(self) -> Loading:
        gc.collect()
        if memory.supported():
            memory.reset_peak()
        self.model = self.variant.load(self.job.checkpoint)
        peak = self._above_imports(memory.peak_bytes()) if memory.supported() else None
        return Loading(weight_bytes(self.model), peak)

    def _above_imports(self, level: int) -> int | None:
        return level - self.imported_bytes if self.imported_bytes is not None else None

    def warm_up(self) -> int | None:
        """Take every timed path once; return the memory above the imports while ready for the next token."""
        with torch.inference_mode(), self.variant.context():
            self.sample(new_tokens=2)
            gc.collect()
            return self._above_imports(memory.resident_bytes()) if memory.supported() else None

    def sample(self, new_tokens: int) -> Sample:
        """Time one prefill of the long prompt, and the greedy answer to the chat prompt."""
        _, prefill = self._generate(self.prompt, 1)
        answer, times = self._generate(self.chat, new_tokens)
        decode = (times[-1] - times[1]) / (new_tokens - 1)
        return Sample(prefill[1] - prefill[0], decode, times[1] - times[0], tuple(answer))

    def _generate(self, prompt: Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
        """Return LitGPT's greedy tokens, and the time before the first and after each one."""
        total = len(prompt) + new_tokens
        tokens, times = [], [time.perf_counter()]
        with self.variant.context():
            self.model.set_kv_cache(batch_size=1, max_seq_length=total)
            options: dict[str, Any] = {"temperature": 0.0, "include_prompt": False, "include_eos": True}
            for token in generate_fn(self.model, prompt, total, **options):
                times.append(time.perf_counter())
                tokens.append(int(token))
        self.model.clear_kv_cache()
        return tokens, times

    def quality(self) -> quality.Quality:
        """Compare the logits of every window with float32's, which float32 itself leaves in `scratch`."""
        logits = torch.cat([self._logits(self.model, window) for window in self.windows])
        path = self.job.scratch / "reference.pt"
        if self.variant.name == BASELINE:
            torch.save(logits, path)
        reference = torch.load(path, mmap=True, weights_only=True)
        return quality.assess(logits, reference, next_tokens(self.windows))

    def stress(self, scale: int) -> StressOutcome:
        """Build the scaled model beside the loaded one and look at its logits."""
        config = Config.from_checkpoint(self.job.checkpoint)
        state = torch.load(self.job.checkpoint / "lit_model.pth", mmap=True, weights_only=True)
        model = self.variant.from_state(stress.stress(state.get("model", state), scale), config)
        stress.stress_eps(model, scale)
        tokens = self.windows[0, :STRESS_TOKENS]
        logits = self._logits(model, tokens)
        reference = torch.load(self.job.scratch / "reference.pt", mmap=True, weights_only=True)[: len(tokens)]
        return stress_outcome(scale, logits, reference)

    def _logits(self, model: torch.nn.Module, tokens: Tensor) -> Tensor:
        """Logits of all positions, shape (len(tokens), vocabulary), float32."""
        with torch.inference_mode(), self.variant.context():
            logits: Tensor = model(tokens.unsqueeze(0))
        return logits[0].float()


def stress_outcome(scale: int, logits: Tensor, reference: Tensor) -> StressOutcome:
    """Judge the logits of a scaled model, both (positions, vocabulary)."""
    share = quality.nonfinite_share(logits)
    return StressOutcome(scale, share, None if share else quality.relative_error(logits, reference))


def next_tokens(windows: Tensor) -> Tensor:
    """The token after each position, -100 after the last of each window; (windows * length,)."""
    following = windows.roll(-1, dims=1)
    following[:, -1] = -100
    return following.flatten()


@dataclass(frozen=True)
class Failure:
    """What a request died of: one line, and the traceback."""

    reason: str
    details: str


def serve(connection: Connection, job: Job) -> None:
    """Answer requests (method name, arguments) until the parent closes the connection or is gone."""
    worker: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, arguments = connection.recv()
            try:
                worker = worker or _worker(job)
                answer = getattr(worker, method)(*arguments)
            except Exception as error:  # reported by the parent, which fails the run
                answer = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(answer)


def _worker(job: Job) -> Any:
    if job.variant in PEERS:
        from benchmarks.peers import worker_of  # which imports this module

        return worker_of(job)
    return Worker(job)

"""What the peers outside of PyTorch have in common: how they load, are timed and judged, one token at a time."""

import gc
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from litgpt.config import Config
from torch import Tensor

from benchmarks.harness import memory, quality
from benchmarks.harness.job import (
    STRESS_TOKENS,
    Job,
    Loading,
    Sample,
    StressOutcome,
    next_tokens,
    prompt_of,
    spans,
    stress_outcome,
)
from benchmarks.harness.variants import share_in_use
from benchmarks.models.architecture import architecture


class Model(Protocol):
    """A loaded model that keeps its own cache; positions are counted from `reset`."""

    def reset(self) -> None: ...

    def run(self, tokens: list[int], all_logits: bool = False) -> Tensor:
        """Return the logits of the last position (1, vocabulary), or of all; float32, valid until the next call."""

    def close(self) -> None: ...


def missing(module: str, package: str) -> str | None:
    """Return that ``package`` is not installed and how to get it, or None."""
    try:
        importlib.import_module(module)
    except ImportError:
        return f"{package} is not installed; `pip install {package}` brings it"
    return None


def not_written(config: Config, *architectures: str) -> str | None:
    """Return that the model is of none of the ``architectures`` that are written for a peer, or None."""
    if architecture(config) in architectures:
        return None
    return f"{config.name} is not of an architecture that is written for this peer: {', '.join(architectures)}"


class PeerWorker:
    """What a variant's worker does (worker.py), for one peer; subclasses write the model and weigh it."""

    def __init__(self, job: Job, open_model: Callable[[Path, int], Model]) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job, self.open_model = job, open_model
        self.model: Any = None
        self.imported_bytes = memory.resident_bytes() if memory.supported() else None

    def written(self, scale: int) -> Path:
        """Write the model, its residual stream scaled as in the stress test, into a file."""
        raise NotImplementedError

    def weight_bytes(self, path: Path) -> int:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Return LitGPT's weights, mapped."""
        loaded: Any = torch.load(self.job.checkpoint / "lit_model.pth", mmap=True, weights_only=True)
        weights: dict[str, Tensor] = loaded.get("model", loaded)
        return weights

    def threads(self) -> int:
        return torch.get_num_threads()

    def load(self) -> Loading:
        path = self.written(1)
        gc.collect()
        if memory.supported():
            self.imported_bytes = memory.resident_bytes()
            memory.reset_peak()
        self.model = self.open_model(path, self.threads())
        peak = self._above_imports(memory.peak_bytes()) if memory.supported() else None
        size = self.weight_bytes(path)
        return Loading(size, peak, size - self._idle_bytes())

    def _idle_bytes(self) -> int:
        """What a token does not read: of its embedding all but a row, and the experts that it does not choose.

        Where the head shares the embedding's memory, the head reads all of it.
        """
        state, config = self.state(), Config.from_checkpoint(self.job.checkpoint)
        table, head = state["transformer.wte.weight"], state.get("lm_head.weight")
        idle = 0 if head is None or torch.equal(head, table) else table.numel()
        for name, weight in state.items():
            idle += round((1 - share_in_use(name, config)) * weight.numel())
        return 2 * idle

    def _above_imports(self, level: int) -> int | None:
        return level - self.imported_bytes if self.imported_bytes is not None else None

    def warm_up(self) -> int | None:
        self.sample(new_tokens=2)
        return self._above_imports(memory.resident_bytes()) if memory.supported() else None

    def sample(self, new_tokens: int) -> Sample:
        _, prefill = self._generate(list(self.job.prompt), 1)
        answer, times = self._generate(list(self.job.chat), new_tokens)
        first_token, decode = spans(times)
        return Sample(prefill[1] - prefill[0], decode, first_token, tuple(answer))

    def context(self, length: int, new_tokens: int) -> tuple[float, float]:
        _, times = self._generate(list(prompt_of(self.job, length)), new_tokens)
        return spans(times)

    def _generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
        self.model.reset()
        tokens, times = list[int](), [time.perf_counter()]
        following = prompt
        for _ in range(new_tokens):
            following = [int(self.model.run(following)[0].argmax())]
            times.append(time.perf_counter())
            tokens += following
        return tokens, times

    def quality(self) -> quality.Quality:
        windows = torch.tensor(self.job.windows)
        parts = []
        for window in windows.tolist():
            self.model.reset()
            parts.append(self.model.run(window, all_logits=True).clone())
        return quality.assess(torch.cat(parts), self._reference(), next_tokens(windows))

    def stress(self, scale: int) -> StressOutcome:
        model, tokens = self.open_model(self.written(scale), self.threads()), list(self.job.windows[0][:STRESS_TOKENS])
        logits = model.run(tokens, all_logits=True).clone()
        model.close()
        return stress_outcome(scale, logits, self._reference()[: len(tokens)])

    def _reference(self) -> Tensor:
        reference: Tensor = torch.load(self.job.scratch / "reference.pt", mmap=True, weights_only=True)
        return reference

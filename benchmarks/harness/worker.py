"""One of PyTorch's variants in a process of its own: it loads the model, then measures what the parent asks for.

Nothing here decides what is measured or when: the parent interleaves the variants (session.py).
"""

import gc
import importlib
import time
from typing import Any

import torch
from litgpt.config import Config
from litgpt.generate.base import batched_generate_fn, generate_fn
from torch import Tensor

from benchmarks.harness import memory, quality, stress
from benchmarks.harness.job import (
    STRESS_TOKENS,
    Job,
    Loading,
    Sample,
    StressOutcome,
    next_tokens,
    prompt_of,
    prompts_of,
    spans,
    stress_outcome,
)
from benchmarks.harness.variants import BASELINE, VARIANTS, bytes_per_token, prompt_operations, weight_bytes


class Worker:
    """Methods are what the parent may ask for; see child.py."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.variant = VARIANTS[job.variant]
        self.prompt, self.chat = torch.tensor(job.prompt), torch.tensor(job.chat)
        self.windows = torch.tensor(job.windows)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if job.variant.startswith("upcast"):
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
        return Loading(
            weight_bytes(self.model), peak, bytes_per_token(self.model), prompt_operations(self.model, len(self.prompt))
        )

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
        first_token, decode = spans(times)
        return Sample(prefill[1] - prefill[0], decode, first_token, tuple(answer))

    def context(self, length: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds of a prompt of ``length`` tokens, and per token after it."""
        _, times = self._generate(torch.tensor(prompt_of(self.job, length)), new_tokens)
        return spans(times)

    def batch(self, size: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds of ``size`` prompts at once, and per step of LitGPT's batched generation after them."""
        prompts = torch.tensor(prompts_of(self.job, size))
        total = prompts.shape[1] + new_tokens
        times = [time.perf_counter()]
        with self.variant.context():
            self.model.set_kv_cache(batch_size=size, max_seq_length=total)
            options: dict[str, Any] = {
                "sample_args": {"temperature": 0.0},
                "include_prompt": False,
                "include_eos": True,
            }
            for _ in batched_generate_fn(self.model, prompts, total, **options):
                times.append(time.perf_counter())
        self.model.clear_kv_cache()
        return spans(times)

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

"""What a variant's worker does (worker.py), for several sequences at once in Transformers' `generate`."""

import gc
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.job import BATCHED, Job, Loading, prompts_of, spans
from benchmarks.harness.variants import weight_bytes
from benchmarks.models.transformers_checkpoint import write_transformers

VARIANTS = {"float32, Transformers": torch.float32, "upcast, Transformers": None}
"""Name -> the dtype that Transformers loads, or None: upcast loads."""


class TransformersWorker:
    """Methods are what the parent may ask for; see child.py."""

    def __init__(self, job: Job) -> None:
        self.job, self.dtype = job, VARIANTS[job.variant]
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    def load(self) -> Loading:
        import transformers

        folder = write_transformers(self.job.checkpoint, self.job.scratch / self.job.variant)
        transformers.logging.disable_progress_bar()
        gc.collect()
        model_class = transformers.AutoModelForCausalLM
        if self.dtype is None:
            import upcast

            self.model: Any = upcast.from_pretrained(model_class, folder)
        else:
            self.model = model_class.from_pretrained(folder, dtype=self.dtype)
        self.model.generation_config.eos_token_id = None  # min_new_tokens would look at all logits of every step
        return Loading(weight_bytes(self.model), None)

    def batch(self, size: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds of ``size`` prompts at once, and per step after them."""
        ids, mask = padded(self.job, size)
        times = [time.perf_counter()]

        def stamp(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool)

        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        with torch.inference_mode():
            self.model.generate(ids, attention_mask=mask, stopping_criteria=[stamp], **options)
        return spans(times)


def padded(job: Job, size: int) -> tuple[Tensor, Tensor]:
    """Return ``size`` prompts, some shorter than the others and padded on the left, and their attention mask."""
    ids = torch.tensor(prompts_of(job, size))
    missing = torch.arange(size)[:, None] % 8
    mask = (torch.arange(BATCHED) >= missing).long()
    return ids * mask, mask

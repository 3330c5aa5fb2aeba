"""Fine-tuning on a float16 base beside float32: memory of a step, time of a step, the loss at every step.

    python -m benchmarks.harness.training  # SmolLM2-135M, LoRA r=8, sequence 256, batch 4, in LitGPT
    python -m benchmarks.harness.training --library transformers  # the same with PEFT
    python -m benchmarks.harness.training --steps 200 --scale 64 --variants float32 upcast float16
    python benchmarks/run.py --suite training           # both libraries, 200 steps, the stress test, and the picture

Every variant trains in a process of its own, in interleaved steps, on the same text from the same adapters. The step is
that of `litgpt finetune_lora`: logits in chunks, AdamW on what learns, clipping.
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import memory, stress
from benchmarks.models import smollm2

VARIANTS = ("float32", "upcast", "float16")
RANK, SEED = 8, 1


@dataclass(frozen=True)
class Job:
    """What one process trains; `scale` is that of the exact stress test."""

    variant: str
    library: str = "litgpt"
    batch: int = 4
    sequence: int = 256
    scale: int = 1
    threads: int = 2
    rate: float = 1e-3

    @property
    def name(self) -> str:
        """The variant, and the scale of its stress test."""
        return self.variant if self.scale == 1 else f"{self.variant} x{self.scale}"


@dataclass
class Course:
    """What one process measured. Memory is above what the process held with all libraries imported."""

    weight_bytes: int
    loaded_bytes: int
    peak_bytes: int
    resident: list[int]
    seconds: list[float]
    losses: list[float]


class Trainer:
    """One variant: its model, its optimizer and its text."""

    def __init__(self, job: Job) -> None:
        import upcast  # noqa: F401 - an imported library, not part of the model

        torch.set_num_threads(job.threads)
        self.job = job
        self.text = _text(job)
        torch.nn.functional.linear(torch.ones(256, 256), torch.ones(256, 256))  # starts threads and matmul library
        self.imported = memory.resident_bytes()
        self.model = (_litgpt if job.library == "litgpt" else _transformers)(job)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=job.rate, weight_decay=0.0)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading left behind is no part of a step
        memory.reset_peak()
        self.loaded = memory.resident_bytes() - self.imported
        self.steps = 0

    def step(self) -> tuple[float, float, int]:
        """Train once; return the loss, the seconds that it took and the bytes held afterwards."""
        size = self.job.batch * (self.job.sequence + 1)
        at = self.steps * size % (len(self.text) - size)
        tokens = self.text[at : at + size].view(self.job.batch, -1)
        start = time.perf_counter()
        loss = _litgpt_loss(self.model, tokens) if self.job.library == "litgpt" else _own_loss(self.model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return float(loss.detach()), time.perf_counter() - start, memory.resident_bytes() - self.imported

    def figures(self) -> tuple[int, int, int]:
        """Return the bytes of the weights, those held before the first step, and the peak since then."""
        stored = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        return sum(stored.values()), self.loaded, memory.peak_bytes() - self.imported


def _text(job: Job) -> Tensor:
    from litgpt.tokenizer import Tokenizer

    from benchmarks.harness.subject import topics_text

    tokens: Tensor = Tokenizer(smollm2.prepare()).encode(topics_text()[:400_000], bos=False).long()
    return tokens


def _litgpt(job: Job) -> Any:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    import upcast

    folder = smollm2.prepare()
    settings = {"lora_r": RANK, "lora_alpha": 16, "lora_query": True, "lora_value": True}
    torch.manual_seed(SEED)
    dtype = torch.float16 if job.variant == "float16" else torch.float32
    state = stress.stress(torch.load(folder / "lit_model.pth", mmap=True, weights_only=True), job.scale)
    with torch.device("meta"):
        model = GPT(Config.from_file(folder / "model_config.yaml", **settings))
    mark_only_lora_as_trainable(model)
    copies = {name: tensor.detach().to(dtype, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    for module in model.modules():
        if hasattr(module, "lora_A"):  # LitGPT's own start
            for name in ("lora_A", "lora_B"):
                setattr(module, name, torch.nn.Parameter(torch.empty(getattr(module, name).shape, dtype=dtype)))
            module.reset_parameters()
    model.cos, model.sin = model.rope_cache()
    stress.stress_eps(model, job.scale)
    return upcast.patch(model.train()) if job.variant == "upcast" else model.train()


def _litgpt_loss(model: Any, tokens: Tensor) -> Tensor:
    from litgpt.utils import chunked_cross_entropy

    logits = model(tokens[:, :-1], lm_head_chunk_size=128)
    return torch.as_tensor(chunked_cross_entropy([part.float() for part in logits], tokens[:, 1:]))


def _transformers(job: Job) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import upcast
    from benchmarks.models.smollm2_transformers import prepare_transformers

    dtype = torch.float16 if job.variant == "float16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(prepare_transformers(), dtype=dtype)
    if job.variant == "upcast":
        model = upcast.patch(model.requires_grad_(False))
    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"])).train()


def _own_loss(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
    return loss


# --- processes --------------------------------------------------------------------------------------------------------


def _serve(connection: Connection, job: Job) -> None:
    warnings.simplefilter("ignore")
    trainer = Trainer(job)
    connection.send("ready")
    while True:
        asked = connection.recv()
        connection.send(getattr(trainer, asked)())


class Process:
    """A trainer in a fresh process."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        assert self.connection.recv() == "ready"

    def ask(self, what: str) -> Any:
        self.connection.send(what)
        return self.connection.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def measure(jobs: list[Job], steps: int) -> dict[str, Course]:
    """Train every job for so many steps, a step of each in turn; return name -> what it measured.

    A job whose loss is not finite is left there.
    """
    os.environ["UPCAST_VERBOSE"] = "0"
    processes = {job.name: Process(job) for job in jobs}
    rows: dict[str, list[Any]] = {name: [] for name in processes}
    try:
        for step in range(steps):
            for name in list(processes)[:: 1 if step % 2 else -1]:
                if not rows[name] or math.isfinite(rows[name][-1][0]):
                    rows[name].append(processes[name].ask("step"))
        courses = {}
        for name, process in processes.items():
            losses, seconds, resident = (list(column) for column in zip(*rows[name], strict=True))
            weights, loaded, peak = process.ask("figures")
            courses[name] = Course(weights, loaded, peak, resident, seconds, losses)
        return courses
    finally:
        for process in processes.values():
            process.close()


def summary(courses: dict[str, Course], skip: int = 2) -> str:
    """Return a line per variant, beside float32; the first ``skip`` steps are no part of the time."""
    base = courses.get("float32")
    lines = []
    for name, course in courses.items():
        seconds = statistics.median(course.seconds[skip:] or course.seconds)
        line = (
            f"{name:8} weights {course.weight_bytes / 1e6:6.1f} MB  peak {course.peak_bytes / 1e6:7.1f} MB  "
            f"step {seconds * 1e3:7.0f} ms  loss {course.losses[-1]:.4f}"
        )
        if base is not None and course is not base:
            ratios = [a / b for a, b in zip(course.seconds, base.seconds, strict=False)][skip:]
            saved = base.peak_bytes - course.peak_bytes
            apart = max(abs(a - b) for a, b in zip(course.losses, base.losses, strict=False))
            line += (
                f"  saved {saved / 1e6:.1f} MB ({saved / base.weight_bytes:.0%} of float32's weights)  "
                f"time {statistics.median(ratios or [float('nan')]):.3f}  losses at most {apart:.1e} apart"
            )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("litgpt", "transformers"), default="litgpt")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["float32", "upcast"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--scale", type=int, default=1, help="of the exact stress test (LitGPT only)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jobs = [
        Job(name, options.library, options.batch, options.sequence, options.scale, options.threads)
        for name in options.variants
    ]
    courses = measure(jobs, options.steps)
    print(summary(courses))
    if options.json is not None:
        content = {"jobs": [asdict(job) for job in jobs], "courses": {n: asdict(c) for n, c in courses.items()}}
        options.json.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

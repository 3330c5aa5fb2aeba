"""The batches suite: how many tokens a second when several sequences are decoded together, one of each in every step.

LitGPT's batched generation; Transformers' `generate`, with prompts of different lengths padded on the left; llama.cpp,
whose sequences share a context. Each variant runs with the cache that it has by default. Medians of the rounds.
"""

from collections.abc import Callable
from pathlib import Path

from litgpt.config import Config

from benchmarks.harness import sweep
from benchmarks.harness.job import BATCHED
from benchmarks.harness.session import job_for
from benchmarks.harness.subject import Subject
from benchmarks.harness.sweep import Effort, Results, SweepError
from benchmarks.harness.transformers_worker import VARIANTS as TRANSFORMERS
from benchmarks.harness.variants import BASELINE, LLAMA_CPP
from benchmarks.models.architecture import LLAMA, architecture
from benchmarks.peers import llamacpp

VARIANTS = (BASELINE, "upcast", "upcast-packed")
FULL = Effort((1, 2, 4, 8, 16, 32), 16, 3)
QUICK = Effort((1, 4), 4, 2)


def run(
    measured: Subject, effort: Effort, threads: int | None, scratch: Path, notice: Callable[[str], None]
) -> tuple[Results, list[float], list[str]]:
    """Return the samples, the bytes per second that memory gave meanwhile, and why a peer is not among them."""
    config = Config.from_checkpoint(measured.checkpoint)
    if config.block_size < BATCHED + effort.new_tokens:
        raise SweepError(
            f"{measured.title} takes {config.block_size} tokens, a sequence here has {BATCHED + effort.new_tokens}; "
            "choose a model with a longer context"
        )
    missing = llamacpp.why_not(config)
    others = [*TRANSFORMERS] if architecture(config) == LLAMA else []  # two more mixtures do not fit into 24 GB
    others += [LLAMA_CPP] if missing is None else []
    jobs = [job_for(measured, name, threads, scratch) for name in (*VARIANTS, *others)]
    sizes = {job.variant: effort.sizes for job in jobs}
    results, rates = sweep.measure(jobs, "batch", sizes, effort, notice)
    return results, rates, [missing] if missing else []


def table(results: Results) -> list[list[str]]:
    """Rows of text, the head first: by variant, tokens per second for each number of sequences."""
    rows = [["tokens a second", *(f"{size:,} at once" for size in results[BASELINE])]]
    for name, medians in sweep.medians(results).items():
        rows.append([name, *(f"{size / each.decode:,.0f}" for size, each in medians.items())])
    return rows

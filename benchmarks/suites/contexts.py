"""The contexts suite: prefill and decode after short and long prompts, ours beside llama.cpp's and OpenVINO's.

Each variant runs with the cache that it has by default. A prompt goes in at once (llama.cpp takes 512 tokens at a
time), and wants the last position's logits. Medians of the rounds.
"""

from collections.abc import Callable
from pathlib import Path

from litgpt.config import Config

from benchmarks.harness import sweep
from benchmarks.harness.session import job_for
from benchmarks.harness.subject import Subject
from benchmarks.harness.sweep import Effort, Results, SweepError
from benchmarks.harness.variants import BASELINE, OPENVINO
from benchmarks.peers import registry as peers

VARIANTS = (BASELINE, "upcast", "upcast-packed")
LONGEST = {OPENVINO: 2048}  # our graph for it keeps the scores of all queries: 19 GB at 8,000 tokens


FULL = Effort((512, 2048, 8000, 32000), 16, 3)  # as far as the model takes them
QUICK = Effort((64, 256), 4, 2)


def run(
    measured: Subject, effort: Effort, threads: int | None, scratch: Path, notice: Callable[[str], None]
) -> tuple[Results, list[float], list[str]]:
    """Return the samples, the bytes per second that memory gave meanwhile, and why a peer is not among them."""
    config = Config.from_checkpoint(measured.checkpoint)
    lengths = [length for length in effort.sizes if length + effort.new_tokens <= config.block_size]
    if not lengths:
        raise SweepError(
            f"{measured.title} takes {config.block_size} tokens, the shortest prompt here has {min(effort.sizes)}; "
            "choose a model with a longer context"
        )
    found, missing = peers.available(config)
    jobs = [job_for(measured, name, threads, scratch) for name in (*VARIANTS, *found)]
    sizes = {job.variant: [n for n in lengths if n <= LONGEST.get(job.variant, n)] for job in jobs}
    results, rates = sweep.measure(jobs, "context", sizes, effort, notice)
    return results, rates, missing


def table(results: Results) -> list[list[str]]:
    """Rows of text, the head first: by variant, tokens per second of the prompt and milliseconds per token after it."""
    lengths = list(results[BASELINE])
    rows = [["", *(f"prefill of {n:,}" for n in lengths), *(f"decode after {n:,}" for n in lengths)]]
    for name, medians in sweep.medians(results).items():
        found = [(length, medians.get(length)) for length in lengths]
        prefill = [f"{length / each.prefill:,.0f} tok/s" if each else "-" for length, each in found]
        rows.append([name, *prefill, *(f"{each.decode * 1e3:.1f} ms" if each else "-" for _, each in found)])
    return rows

"""The contexts suite: prefill and decode after short and long prompts, ours beside llama.cpp's and OpenVINO's.

Each variant runs in its own process, in interleaved rounds, with the cache that it has by default. A prompt goes in at
once (llama.cpp takes 512 tokens at a time), and wants the last position's logits. Medians of the rounds.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from litgpt.config import Config
from rich.console import Console
from rich.table import Table

from benchmarks.harness import limits, machine
from benchmarks.harness.session import Session, job_for, started
from benchmarks.harness.subject import Subject
from benchmarks.harness.summary import summarise
from benchmarks.harness.variants import BASELINE, OPENVINO
from benchmarks.peers import registry as peers

VARIANTS = (BASELINE, "upcast", "upcast-packed")
LONGEST = {OPENVINO: 2048}  # our graph for it keeps the scores of all queries: 19 GB at 8,000 tokens


class ContextsError(Exception):
    """A variant failed."""


@dataclass(frozen=True)
class Effort:
    lengths: tuple[int, ...]  # tokens of the prompts
    new_tokens: int
    rounds: int


FULL = Effort((512, 2048, 8000), 16, 3)
QUICK = Effort((64, 256), 4, 2)


class Sample(NamedTuple):
    """Seconds of a prompt, and per token after it."""

    prefill: float
    decode: float


Results = dict[str, dict[int, list[Sample]]]  # by variant, length of the prompt


def run(
    measured: Subject, effort: Effort, threads: int | None, scratch: Path, notice: Callable[[str], None]
) -> tuple[Results, list[float], list[str]]:
    """Return the samples, the bytes per second that memory gave meanwhile, and why a peer is not among them."""
    config = Config.from_checkpoint(measured.checkpoint)
    lengths = [length for length in effort.lengths if length + effort.new_tokens <= config.block_size]
    if not lengths:
        raise ContextsError(
            f"{measured.title} takes {config.block_size} tokens, the shortest prompt here has {min(effort.lengths)}; "
            "choose a model with a longer context"
        )
    found, missing = peers.available(config)
    jobs = [job_for(measured, name, threads, scratch) for name in (*VARIANTS, *found)]
    results: Results = {
        job.variant: {length: [] for length in lengths if length <= LONGEST.get(job.variant, length)} for job in jobs
    }
    rates = []
    memory = limits.Memory()
    with started(jobs) as session:
        notice("Importing the libraries, loading the models")
        session.ask_all(list(results), "load")
        for index in range(effort.rounds):
            rates.append(memory.rate())
            for length in lengths:
                for name in _turn([name for name in results if length in results[name]], index):
                    notice(f"Round {index + 1} of {effort.rounds}: {length} tokens, {name}")
                    results[name][length].append(_sample(session, name, length, effort.new_tokens))
    return results, rates, missing


def _turn(names: list[str], index: int) -> list[str]:
    """Each round begins with another one."""
    first = index % len(names)
    return names[first:] + names[:first]


def _sample(session: Session, name: str, length: int, new_tokens: int) -> Sample:
    answer = session.ask(name, "context", length, new_tokens)
    if answer is None:
        raise ContextsError(f"{name}, {length} tokens: {session.results[name].failure}")
    return Sample(*answer)


def median(samples: Sequence[Sample]) -> Sample:
    return Sample(*(summarise(values).median for values in zip(*samples, strict=True)))


def table(results: Results) -> list[list[str]]:
    """Rows of text, the head first: by variant, tokens per second of the prompt and milliseconds per token after it."""
    lengths = list(results[BASELINE])
    rows = [["", *(f"prefill of {n:,}" for n in lengths), *(f"decode after {n:,}" for n in lengths)]]
    for name, by_length in results.items():
        medians = {length: median(samples) for length, samples in by_length.items()}
        found = [(length, medians.get(length)) for length in lengths]
        prefill = [f"{length / each.prefill:,.0f} tok/s" if each else "-" for length, each in found]
        rows.append([name, *prefill, *(f"{each.decode * 1e3:.1f} ms" if each else "-" for _, each in found)])
    return rows


def show(title: str, results: Results, rates: list[float]) -> None:
    head, *rows = table(results)
    shown = Table(
        *head, title=f"{title} on {machine.cpu_model()}; memory was read at {summarise(rates).median / 1e9:.1f} GB/s"
    )
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.width = max(console.width, 40 + 20 * len(head))
    console.print(shown)


def record(title: str, effort: Effort, threads: int | None, results: Results, rates: list[float]) -> dict[str, Any]:
    """Return the content of the JSON file, in seconds and bytes per second."""
    facts = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    samples = {
        name: {str(length): [sample._asdict() for sample in each] for length, each in by_length.items()}
        for name, by_length in results.items()
    }
    return {
        "suite": "contexts",
        "model": title,
        "new_tokens": effort.new_tokens,
        "threads": threads or torch.get_num_threads(),
        **facts,
        "read": rates,
        "samples": samples,
    }


def samples_of(record: dict[str, Any]) -> Results:
    """Return the samples that `record` made into JSON."""
    return {
        name: {int(length): [Sample(**sample) for sample in each] for length, each in by_length.items()}
        for name, by_length in record["samples"].items()
    }


def write(output: Path, title: str, content: dict[str, Any]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{title}-contexts.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path

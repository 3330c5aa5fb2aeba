"""One measurement at several sizes: each variant in a process of its own, interleaved rounds, beside memory's speed."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import limits, machine
from benchmarks.harness.job import Job
from benchmarks.harness.session import Session, started
from benchmarks.harness.summary import summarise


class SweepError(Exception):
    """A variant failed, or the model is too small."""


class Effort(NamedTuple):
    """How much is measured."""

    sizes: tuple[int, ...]  # tokens of the prompts, or sequences
    new_tokens: int
    rounds: int


class Sample(NamedTuple):
    """Seconds of the prompt, and per step after it."""

    prefill: float
    decode: float


Results = dict[str, dict[int, list[Sample]]]  # by variant and size


def measure(
    jobs: Sequence[Job],
    question: str,
    sizes: Mapping[str, Sequence[int]],
    effort: Effort,
    notice: Callable[[str], None],
) -> tuple[Results, list[float]]:
    """Ask every worker ``question`` (a method that gives a `Sample`) at each of its ``sizes``, by variant.

    Return the samples, and the bytes per second that memory gave meanwhile.
    """
    results: Results = {job.variant: {size: [] for size in sizes[job.variant]} for job in jobs}
    rates = []
    memory = limits.Memory()
    with started(jobs) as session:
        notice("Importing the libraries, loading the models")
        session.ask_all(list(results), "load")
        for index in range(effort.rounds):
            rates.append(memory.rate())
            for size in sorted({size for each in results.values() for size in each}):
                for name in _turn([name for name in results if size in results[name]], index):
                    notice(f"Round {index + 1} of {effort.rounds}: {question} of {size:,}, {name}")
                    results[name][size].append(_sample(session, name, question, size, effort.new_tokens))
    return results, rates


def _turn(names: list[str], index: int) -> list[str]:
    """Each round begins with another one."""
    first = index % len(names)
    return names[first:] + names[:first]


def _sample(session: Session, name: str, question: str, size: int, new_tokens: int) -> Sample:
    answer = session.ask(name, question, size, new_tokens)
    if answer is None:
        raise SweepError(f"{name}, {question} of {size:,}: {session.results[name].failure}")
    return Sample(*answer)


def median(samples: Sequence[Sample]) -> Sample:
    return Sample(*(summarise(values).median for values in zip(*samples, strict=True)))


def medians(results: Results) -> dict[str, dict[int, Sample]]:
    return {name: {size: median(samples) for size, samples in each.items()} for name, each in results.items()}


def show(title: str, table: list[list[str]], rates: list[float]) -> None:
    """Print a table whose first row is its head."""
    head, *rows = table
    shown = Table(
        *head, title=f"{title} on {machine.cpu_model()}; memory was read at {summarise(rates).median / 1e9:.1f} GB/s"
    )
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.width = max(console.width, 40 + 20 * len(head))
    console.print(shown)


def record(
    suite: str, title: str, new_tokens: int, threads: int | None, results: Results, rates: list[float]
) -> dict[str, Any]:
    """Return the content of the JSON file, in seconds and bytes per second."""
    facts = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    facts["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    samples = {
        name: {str(size): [sample._asdict() for sample in each] for size, each in by_size.items()}
        for name, by_size in results.items()
    }
    return {
        "suite": suite,
        "model": title,
        "new_tokens": new_tokens,
        "threads": threads or torch.get_num_threads(),
        **facts,
        "read": rates,
        "samples": samples,
    }


def samples_of(record: dict[str, Any]) -> Results:
    """Return the samples that `record` made into JSON."""
    return {
        name: {int(size): [Sample(**sample) for sample in each] for size, each in by_size.items()}
        for name, by_size in record["samples"].items()
    }


def write(output: Path, content: dict[str, Any]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{content['model']}-{content['suite']}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path

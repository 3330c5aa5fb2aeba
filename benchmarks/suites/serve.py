"""``run.py --suite serve``: LitGPT as a server, upcast against float32, on the same checkpoint.

Three questions: how fast are requests answered (both servers are up, and asked in turn), what does a second serving
process add to the memory of the machine, and how long does a fresh process take to its first token.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, serving
from benchmarks.harness.subject import QUESTION, Subject

FLOAT32, OURS = "float32", "upcast"
VARIANTS = {FLOAT32: {}, OURS: {"UPCAST": "1", "UPCAST_VERBOSE": "0"}}
PRECISION = {FLOAT32: "32-true", OURS: None}
PATIENCE = 600
# Requests ask in turn, so that no answer comes from what the request before had computed; only the chat template's
# first words are the same, as in real use.
ANIMALS = ("llamas", "otters", "owls", "bees", "whales", "goats", "snails")

# A fresh process: the time of each step, and whether upcast was there.
FRESH = """
import json, sys, time
begin = time.perf_counter()
from litgpt import LLM
imported = time.perf_counter()
llm = LLM.load(sys.argv[1], distribute=None)
llm.distribute(accelerator="cpu", precision=json.loads(sys.argv[2]))
loaded = time.perf_counter()
next(llm.generate(sys.argv[3], top_k=1, max_new_tokens=2, stream=True))
first = time.perf_counter()
kind = type(llm.model.lm_head.weight).__name__
print(json.dumps([imported - begin, loaded - imported, first - loaded, kind]))
"""


@dataclass(frozen=True)
class Load:
    """How much is measured: requests per variant, tokens in each answer, fresh processes per variant."""

    requests: int
    new_tokens: int
    starts: int


FULL, QUICK = Load(20, 32, 5), Load(4, 8, 1)


@dataclass
class Served:
    """All figures of one variant: seconds and bytes, one entry per request or start."""

    answer: str = ""
    first_token: list[float] = field(default_factory=list)
    request: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    weight_bytes: int = 0
    first_process_bytes: int = 0
    second_process_bytes: int = 0
    starts: list[tuple[float, float, float]] = field(default_factory=list)  # import, load, first token


class ServeError(RuntimeError):
    """A variant that is not what it should be; the message says which and how."""


def run(subject: Subject, load: Load, scratch: Path, notice: Callable[[str], object]) -> dict[str, Served]:
    """Measure both variants on the subject's checkpoint."""
    results = {name: Served() for name in VARIANTS}
    notice("Asking two servers in turn")
    _ask(subject, load, scratch, results)
    for name, served in results.items():
        notice(f"Starting a second process of {name}")
        _share(name, subject, served)
    for index in range(load.starts):
        notice(f"Fresh processes, round {index + 1} of {load.starts}")
        for name, served in results.items():
            served.starts.append(_start(name, subject.checkpoint))
    if results[OURS].answer != results[FLOAT32].answer:
        raise ServeError(f"upcast answered {results[OURS].answer!r}, float32 {results[FLOAT32].answer!r}")
    return results


# --- requests ---------------------------------------------------------------------------------------------------------


def _ask(subject: Subject, load: Load, scratch: Path, results: dict[str, Served]) -> None:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_server(name, subject, load, scratch)) for name in VARIANTS}
        for name, server in servers.items():  # the first request of a server is not like the others
            results[name].answer = "".join(_request(server, QUESTION)[2])
        for index in range(load.requests):
            question = f"What do {ANIMALS[(index + 1) % len(ANIMALS)]} eat?"
            for name, server in servers.items():
                first, total, pieces = _request(server, question)
                served = results[name]
                served.first_token.append(first)
                served.request.append(total)
                served.tokens.append(len(pieces))


@contextmanager
def _server(name: str, subject: Subject, load: Load, scratch: Path) -> Iterator[serving.Server]:
    port, precision = serving.free_port(), PRECISION[name]
    arguments = ["-m", "litgpt", "serve", str(subject.checkpoint), "--port", str(port), "--accelerator", "cpu"]
    arguments += ["--stream", "true", "--top_k", "1", "--max_new_tokens", str(load.new_tokens), "--timeout", "600"]
    arguments += ["--precision", precision] if precision else []
    with serving.serve(arguments, port, scratch / f"{name}.log", VARIANTS[name]) as server:
        mapped = bool(server.models(subject.checkpoint))
        if mapped != (name == OURS):
            raise ServeError(f"the server of {name} {'maps' if mapped else 'does not map'} the checkpoint")
        yield server


def _request(server: serving.Server, question: str) -> tuple[float, float, list[str]]:
    """Return the seconds to the first piece and to the end, and the pieces: one per token."""
    begin, first, pieces = time.perf_counter(), 0.0, []
    for line in server.stream("/predict", {"prompt": question}):
        first = first or time.perf_counter() - begin
        pieces.append(json.loads(line)["output"])
    return first, time.perf_counter() - begin, pieces


# --- memory -----------------------------------------------------------------------------------------------------------


def _share(name: str, subject: Subject, served: Served) -> None:
    """Start two processes that have everything but a model; note what each adds to the PSS of both when it serves."""
    with ExitStack() as stack:
        both = [stack.enter_context(_process(name, subject)) for _ in range(2)]
        levels = [_pss(both, subject.checkpoint)]
        for _, connection in both:
            connection.send("serve")
            served.weight_bytes = _answer(connection)
            levels.append(_pss(both, subject.checkpoint))
    served.first_process_bytes, served.second_process_bytes = levels[1] - levels[0], levels[2] - levels[1]


@contextmanager
def _process(name: str, subject: Subject) -> Iterator[tuple[int, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ.update(VARIANTS[name])
    try:
        process = context.Process(target=_worker, args=(theirs, subject.checkpoint, PRECISION[name]), daemon=True)
        process.start()
    finally:
        for variable in VARIANTS[name]:
            del os.environ[variable]
    try:
        _answer(ours)  # it has everything but a model
        yield process.pid or 0, ours
    finally:
        process.kill()
        process.join()


def _worker(connection: Connection, checkpoint: Path, precision: str | None) -> None:
    """What a worker of ``litgpt serve`` does (BaseLitAPI.setup), in two steps: the tokenizer, then model and answer.

    Imports and tokenizer are the same in every variant, and none of the weights' business.
    """
    import torch
    from litgpt import LLM

    from benchmarks.harness.variants import weight_bytes

    torch.nn.functional.linear(torch.ones(256, 256), torch.ones(256, 256))  # the thread pool belongs to no model
    llm = LLM.load(str(checkpoint), distribute=None)
    connection.send(0)
    connection.recv()
    llm.distribute(accelerator="cpu", devices=1, precision=precision)
    llm.generate(QUESTION, top_k=1, max_new_tokens=8)
    connection.send(weight_bytes(llm.model))
    connection.recv()


def _answer(connection: Connection) -> int:
    if not connection.poll(PATIENCE):
        raise ServeError(f"a process did not answer within {PATIENCE} s")
    try:
        return int(connection.recv())
    except EOFError:
        raise ServeError("a process ended before it had answered; what it printed says why") from None


def _pss(processes: list[tuple[int, Connection]], checkpoint: Path) -> int:
    return sum(serving.memory_of(pid, checkpoint).pss for pid, _ in processes)


# --- starting ---------------------------------------------------------------------------------------------------------


def _start(name: str, checkpoint: Path) -> tuple[float, float, float]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    command = [sys.executable, "-c", FRESH, str(checkpoint), json.dumps(PRECISION[name]), QUESTION]
    result = subprocess.run(
        command, env={**clean, **VARIANTS[name]}, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if result.returncode:
        raise ServeError(f"a fresh process of {name} failed:\n{result.stderr[-2000:]}")
    *seconds, kind = json.loads(result.stdout.splitlines()[-1])
    if (kind == "HalfWeight") != (name == OURS):
        raise ServeError(f"a fresh process of {name} has weights of type {kind}")
    imported, loaded, first = seconds
    return imported, loaded, first


# --- results ----------------------------------------------------------------------------------------------------------


def figures(served: Served) -> dict[str, float]:
    """Return the medians that the table shows; rates are over all requests."""
    imports, loads, firsts = (statistics.median(column) for column in zip(*served.starts, strict=True))
    return {
        "requests_per_second": len(served.request) / sum(served.request),
        "tokens_per_second": sum(served.tokens) / sum(served.request),
        "first_token_seconds": statistics.median(served.first_token),
        "second_process_share": served.second_process_bytes / served.weight_bytes,
        "import_seconds": imports,
        "load_seconds": loads,
        "fresh_first_token_seconds": firsts,
        "import_to_loaded_seconds": statistics.median(a + b for a, b, _ in served.starts),
        "import_to_first_token_seconds": statistics.median(map(sum, served.starts)),
    }


def record(subject: Subject, load: Load, results: dict[str, Served]) -> dict[str, Any]:
    """Return the content of the JSON file: every sample, in seconds and bytes, and the figures made of them."""
    return {
        "suite": "serve",
        "subject": {"model": subject.title, "weights": subject.weights},
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "load": asdict(load),
        "variants": {name: {**asdict(served), "figures": figures(served)} for name, served in results.items()},
    }


def show(subject: Subject, load: Load, results: dict[str, Served]) -> None:
    """Print the table and what the start-up figures say."""
    table = Table(title=f"litgpt serve, {subject.title}, {load.new_tokens} tokens an answer", title_justify="left")
    for title in ("variant", "requests/s", "tokens/s", "first token", "weights", "1st process", "2nd process adds",
                  "import", "load", "first token, fresh"):  # fmt: skip
        table.add_column(title, justify="left" if title == "variant" else "right")
    for name, served in results.items():
        table.add_row(name, *_cells(served))
    console = Console()
    console.width = max(console.width, 132)
    console.print(table)
    ours, theirs = (figures(results[name]) for name in (OURS, FLOAT32))
    print(
        f"from import to the first token: upcast {ours['import_to_first_token_seconds']:.2f} s; "
        f"float32 has loaded after {theirs['import_to_loaded_seconds']:.2f} s, "
        f"its first token after {theirs['import_to_first_token_seconds']:.2f} s"
    )


def _cells(served: Served) -> tuple[str, ...]:
    found = figures(served)
    return (
        f"{found['requests_per_second']:.2f}",
        f"{found['tokens_per_second']:.1f}",
        f"{1e3 * found['first_token_seconds']:.0f} ms",
        f"{served.weight_bytes / 1e6:.0f} MB",
        f"{served.first_process_bytes / 1e6:.0f} MB",
        f"{served.second_process_bytes / 1e6:.0f} MB ({100 * found['second_process_share']:.0f} %)",
        f"{found['import_seconds']:.2f} s",
        f"{found['load_seconds']:.2f} s",
        f"{found['fresh_first_token_seconds']:.2f} s",
    )

"""The distributed suite: decoding by one rank, by two on the loopback, and by two hosts in network namespaces.

One thread per rank. The cost model (cost.py) gets the memory rate from the run of one rank, the latency from round
trips over the link, gloo's own work per collective from the run over the link without limits, and the rest from the
link's settings. It predicts the runs over all other links; the error is shown.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from litgpt.config import Config
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.harness import cost, machine
from benchmarks.harness.namespaces import Host, Link, hosts, latency, why_not
from upcast.distributed.collectives import WIRES as DTYPES

RANKS, WIRES = (1, 2), tuple(DTYPES)
ROUNDS = 3  # of one process and of ranks on one host, taking turns; the median counts
FREE = Link()
LATE = (Link(delay=2e-4), Link(delay=1e-3), Link(delay=5e-3))
LINKS = (FREE, Link(rate=1e9), Link(rate=1e8), *LATE, Link(rate=1e9, delay=2e-4), Link(rate=1e8, delay=1e-3))
SLOW = Link(rate=1e8)  # where smaller sums could pay
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0  # seconds


class DistributedError(Exception):
    """A rank failed."""


@dataclass(frozen=True)
class Run:
    """One measured setting: medians of seconds per token and of those in collectives; weight bytes of each rank.

    ``latency``: seconds of one small message between the hosts. ``error``: of the logits, relative to the run of one
    process. ``logits``: of the first tokens of the vocabulary, after the prompt.
    """

    name: str
    ranks: int
    seconds: float
    collective_seconds: float
    calls: float
    weight_bytes: tuple[int, ...]
    latency: float | None = None
    predicted: float | None = None
    error: float | None = None
    logits: tuple[float, ...] = ()


def run(checkpoint: Path, tokens: int) -> tuple[list[Run], list[str]]:
    """Measure every setting that this machine allows; return the runs and what was left out, with the reason."""
    rounds = [[_measure(_ranks(n), n, checkpoint, tokens, None) for n in RANKS] for _ in range(ROUNDS)]
    runs = [sorted(same, key=attrgetter("seconds"))[ROUNDS // 2] for same in zip(*rounds, strict=True)]
    left_out, overhead = [], 0.0
    shape = shape_of(checkpoint, runs[0])
    for link in LINKS:
        reason = why_not(delay=bool(link.delay))
        if reason:
            left_out.append(f"{_named(link)}: {reason}")
            continue
        measured = _measure(_named(link), 2, checkpoint, tokens, link)
        if link == FREE:
            overhead = _overhead(shape, measured)
        else:
            measured = replace(measured, predicted=_predicted(shape, runs[0], measured, link, overhead))
        runs.append(measured)
        if link == SLOW:
            runs += [_measure(f"{_named(link)}, {wire}", 2, checkpoint, tokens, link, wire) for wire in WIRES[1:]]
    return [replace(each, error=_error(each, runs[0])) for each in runs], left_out


def _error(run: Run, alone: Run) -> float:
    return math.dist(run.logits, alone.logits) / math.hypot(*alone.logits)


def shape_of(checkpoint: Path, alone: Run) -> cost.Shape:
    """Return what the cost model has to know of a checkpoint."""
    config = Config.from_checkpoint(checkpoint)
    once = config.parallel_residual and not (config.post_attention_norm or config.post_mlp_norm)
    size = float(alone.weight_bytes[0])
    sizes = (config.n_layer, config.n_embd, config.padded_vocab_size)
    return cost.Shape(config.name, size, size, *sizes, sums_per_layer=1 if once else 2)


def _overhead(shape: cost.Shape, free: Run) -> float:
    """Return what a collective takes over a link without limits, beyond its messages."""
    messages = cost.communication(shape, 2, cost.Network(float("inf"), free.latency or 0.0))
    return max(0.0, free.collective_seconds - messages) / free.calls


def _predicted(shape: cost.Shape, alone: Run, measured: Run, link: Link, overhead: float) -> float:
    """Return the model's seconds per token; of the run it takes the latency of the link alone."""
    network = cost.Network(link.rate or float("inf"), measured.latency or 0.0, overhead)
    return cost.seconds_per_token(shape, 2, network, shape.active_bytes / alone.seconds)


def _ranks(count: int) -> str:
    return "1 process" if count == 1 else f"{count} ranks on one host"


def _named(link: Link) -> str:
    rate = "unlimited" if link.rate is None else f"{link.rate / 1e6:,.0f} Mbit/s"
    return f"2 hosts, {rate}" + (f", {1e3 * link.delay:g} ms" if link.delay else "")


def _measure(name: str, ranks: int, checkpoint: Path, tokens: int, link: Link | None, wire: str = "float32") -> Run:
    with ExitStack() as stack:
        places: tuple[Host, ...] = stack.enter_context(hosts(link)) if link else ()
        delay = latency(places) if link else None
        processes = [stack.enter_context(_start(rank, ranks, port, places, checkpoint, tokens, wire))
                     for port in [_free_port()] for rank in range(ranks)]  # fmt: skip
        results = []
        for process in processes:
            out, errors = process.communicate(timeout=10 * TIMEOUT)
            if process.returncode:
                raise DistributedError(f"{name}: {errors.strip().splitlines()[-1] if errors.strip() else 'no message'}")
            results.append(json.loads(out.strip().splitlines()[-1]))
    first = results[0]
    return Run(
        name,
        ranks,
        seconds=statistics.median(first["samples"]),
        collective_seconds=statistics.median(first["collective_samples"]),
        calls=first["calls"] / tokens,
        weight_bytes=tuple(each["weight_bytes"] for each in results),
        latency=delay,
        logits=tuple(first["logits"]),
    )


def _start(
    rank: int, ranks: int, port: int, places: tuple[Host, ...], checkpoint: Path, tokens: int, wire: str
) -> "subprocess.Popen[str]":
    host = places[rank] if places else Host((), "127.0.0.1", "lo")
    address = places[0].address if places else host.address
    where = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    fixed = {"OMP_NUM_THREADS": "1", "UPCAST_VERBOSE": "0", "GLOO_SOCKET_IFNAME": host.interface}
    arguments = [
        "-m",
        "benchmarks.harness.distributed_worker",
        str(checkpoint.resolve()),
        str(tokens),
        str(TIMEOUT),
        wire,
    ]
    command = [*host.prefix, sys.executable, *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **where, **fixed}, **pipes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def record(title: str, tokens: int, runs: list[Run], left_out: list[str]) -> dict[str, Any]:
    """Return the content of the JSON file, in seconds and bytes."""
    facts = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    return {"suite": "distributed", "model": title, "tokens": tokens, "left_out": left_out, **facts,
            "runs": [asdict(replace(each, logits=())) for each in runs]}  # fmt: skip


def show(runs: list[Run], left_out: list[str]) -> None:
    """Print the table and what was left out."""
    table = Table(title="decoding, one thread per rank", title_justify="left")
    titles = ("setting", "us a message", "ms/token", "tokens/s", "against 1", "us a collective", "MB per rank")
    for title in (*titles, "model, ms", "its error", "logits error"):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for each in runs:
        table.add_row(
            each.name,
            f"{1e6 * each.latency:.0f}" if each.latency else "",
            f"{1e3 * each.seconds:.2f}",
            f"{1 / each.seconds:.1f}",
            f"{runs[0].seconds / each.seconds:.2f}x",
            f"{1e6 * each.collective_seconds / each.calls:.0f}" if each.calls else "",
            " + ".join(f"{size / 1e6:.0f}" for size in each.weight_bytes),
            f"{1e3 * each.predicted:.2f}" if each.predicted else "",
            f"{100 * (each.predicted / each.seconds - 1):+.0f} %" if each.predicted else "",
            f"{each.error:.0e}",
        )
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    for line in left_out:
        print(f"left out: {line}")


def draw(content: dict[str, Any], path: Path) -> Path:
    """Draw measured and predicted time per token of every setting; return ``path``."""
    runs = content["runs"]
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(runs)), dpi=160, layout="constrained")
    axis = figure.subplots()
    rest = [1e3 * (each["seconds"] - each["collective_seconds"]) for each in runs]
    sums = [1e3 * each["collective_seconds"] for each in runs]
    rows = range(len(runs))
    axis.barh(rows, rest, color="#0072B2", label="the rank's own work")
    axis.barh(rows, sums, left=rest, color="#D55E00", label="in collectives")
    known = [(1e3 * each["predicted"], row) for row, each in enumerate(runs) if each["predicted"]]
    axis.plot([x for x, _ in known], [y for _, y in known], "k|", markersize=18, label="cost model")
    axis.set_yticks(list(rows), [each["name"] for each in runs])
    axis.invert_yaxis()
    axis.set_xlabel("ms per token")
    axis.set_title(f"{content['model']}, one thread per rank", loc="left")
    axis.legend(frameon=False)
    figure.savefig(path, facecolor="white")
    return path

"""The native linear against float32 F.linear, FBGEMM's packed float16 and the machine's limits, on cold weights.

Beside it the same numbers packed in twelve bits, as a share of its time.

Every measurement rotates over at least 160 MB of distinct weights and alternates between the contestants,
so that a busy neighbour slows them alike; figures are ratios of medians. Answers are checked before anything
is timed.

Beside each figure stands its share of what the machine did at most in the same seconds: reading the weights once, or
multiply-adds in registers, whichever takes longer.

    python benchmarks/suites/kernels.py [--quick] [--json FILE] [--chart FILE]
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script, by its path

from benchmarks.harness import limits
from upcast.kernels import native, packed_native
from upcast.kernels.packed import PackedMatrix

SHAPES = [
    (576, 576),
    (1536, 576),
    (576, 1536),
    (3072, 768),
    (768, 3072),
    (4096, 4096),
    (11008, 4096),
    (49152, 576),
]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
QUICK_SHAPES, QUICK_ROWS = [(576, 576), (3072, 768), (4096, 4096)], [1, 8, 32, 128]
COLD_BYTES = 160e6
# Lowest geometric means asked for: against float32, and against FBGEMM.
TARGETS = {1: (4.0, 1.0), 8: (2.2, 1.0), 16: (1.5, 1.0), 32: (1.5, 1.0), 128: (1.2, 1.0), 512: (1.2, 1.0)}

Call = Callable[[int], Tensor]


def copies(weight: Tensor) -> list[Tensor]:
    """Enough copies of a weight to outgrow the caches."""
    return [weight.clone() for _ in range(max(2, math.ceil(COLD_BYTES / (weight.numel() * weight.element_size()))))]


def packed(weight: Tensor) -> list[Any]:
    """The same for FBGEMM's private format; empty where this torch has none."""
    try:
        count = max(2, math.ceil(COLD_BYTES / (2 * weight.numel())))
        return [torch.ops.quantized.linear_prepack_fp16(weight, None) for _ in range(count)]
    except RuntimeError:
        return []


def twelve_bits(weight: Tensor) -> list[PackedMatrix]:
    """The same for numbers that are bfloat16 ones, packed."""
    matrix = packed_native.pack(weight)
    return [matrix._replace(blob=blob) for blob in copies(matrix.blob)]


def interleaved(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """Median seconds per call of each contestant, taken in turns of about two milliseconds."""
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    begin = time.perf_counter()
    next(iter(calls.values()))(1)
    inner = max(1, int(2e-3 / (time.perf_counter() - begin)))
    end, index = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or index < 3 * inner:
        for name, call in calls.items():
            begin = time.perf_counter()
            for i in range(index, index + inner):
                call(i)
            turns[name].append((time.perf_counter() - begin) / inner)
        index += inner
    return {name: statistics.median(times) for name, times in turns.items()}


class Limits(NamedTuple):
    """What the machine does at most, just now."""

    read: float  # bytes per second
    multiply: float  # float32 operations per second

    def least_seconds(self, shape: tuple[int, int], rows: int) -> float:
        """Seconds that reading a weight, or multiplying so many rows with it, takes at least."""
        weights = shape[0] * shape[1]
        return max(2 * weights / self.read, 2 * weights * rows / self.multiply)


def limits_now(memory: limits.Memory) -> Limits:
    """Measure both limits."""
    rate = limits.multiply_rate()
    assert rate is not None, "this suite measures the native kernels"
    return Limits(memory.rate(), rate)


def print_limits(memory: limits.Memory) -> None:
    """One line for one thread and one for all: multiply-adds in registers, and reads in so many streams per thread."""
    threads = torch.get_num_threads()
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        reads = ", ".join(f"{way} {rate / 1e9:.1f}" for way, rate in memory.rates().items())
        print(f"{count} threads: {(limits.multiply_rate() or 0) / 1e9:.0f} GF/s in registers; GB/s by streams: {reads}")
    torch.set_num_threads(threads)


def turn(call: Callable[[Any], Tensor], weights: list[Any], i: int) -> Tensor:
    """The call on the i-th weight, round and round."""
    return call(weights[i % len(weights)])


def check(calls: dict[str, Call], expected: Tensor) -> None:
    """A benchmark of a wrong answer is worthless; FBGEMM and float32 round differently, hence the slack."""
    for name, call in calls.items():
        error = ((call(0).double() - expected).norm() / expected.norm()).item()
        assert error < 1e-5, (name, error)


def measure_forward(
    shape: tuple[int, int], row_counts: list[int], seconds: float, memory: limits.Memory
) -> list[dict[str, Any]]:
    """One record per number of rows: seconds of each contestant, and the limits of the same seconds."""
    half = (torch.randn(shape) * 0.02).bfloat16().half()  # which both formats hold
    halves, floats, fbgemm, narrow = copies(half), copies(half.float()), packed(half.float()), twelve_bits(half)
    records = []
    for rows in row_counts:
        x = torch.randn(rows, shape[1])
        calls: dict[str, Call] = {
            "native": partial(turn, partial(native.linear, x), halves),
            "float32": partial(turn, partial(F.linear, x), floats),
            "packed": partial(turn, partial(packed_native.linear, x), narrow),
        }
        if fbgemm:
            calls["fbgemm"] = partial(turn, partial(torch.ops.quantized.linear_dynamic_fp16, x), fbgemm)
        check(calls, x.double() @ half.double().t())
        bound = limits_now(memory)
        found = {"shape": shape, "rows": rows, "read": bound.read, "multiply": bound.multiply}
        records.append(found | {"seconds": interleaved(calls, seconds)})
        print(describe(records[-1]), flush=True)
    return records


def measure_backward(
    shape: tuple[int, int], row_counts: list[int], seconds: float, memory: limits.Memory
) -> list[dict[str, Any]]:
    """The gradient with respect to x: dY W against float32's."""
    half = (torch.randn(shape) * 0.02).half()
    halves, floats = copies(half), copies(half.float())
    records = []
    for rows in row_counts:
        dy = torch.randn(rows, shape[0])
        calls: dict[str, Call] = {
            "native": partial(turn, partial(native.matmul, dy), halves),
            "float32": partial(turn, partial(torch.mm, dy), floats),
        }
        check(calls, dy.double() @ half.double())
        bound = limits_now(memory)
        found = {"shape": shape, "rows": rows, "read": bound.read, "multiply": bound.multiply}
        records.append(found | {"seconds": interleaved(calls, seconds)})
        print("backward", describe(records[-1]), flush=True)
    return records


def ratio(record: dict[str, Any], other: str) -> float | None:
    """How many times faster than `other` the native kernel was."""
    seconds = record["seconds"]
    return seconds[other] / seconds["native"] if other in seconds else None


def share(record: dict[str, Any]) -> float:
    """The least time that the limits of the same seconds allow, over the native kernel's."""
    bound = Limits(record["read"], record["multiply"]).least_seconds(record["shape"], record["rows"])
    return bound / float(record["seconds"]["native"])


def describe(record: dict[str, Any]) -> str:
    """One line: shape, rows, GF/s, GB/s of weights, the share of the limit, and ratios."""
    (n, k), rows, seconds = record["shape"], record["rows"], record["seconds"]["native"]
    rate = 2e-9 * n * k / seconds  # GB/s of weights; times M: GF/s
    line = f"{n:6} x {k:4}  M {rows:4}  {rate * rows:6.1f} GF/s  {rate:5.1f} GB/s  {100 * share(record):3.0f} %"
    for other in ("float32", "fbgemm"):
        if value := ratio(record, other):
            line += f"  {value:5.2f} x {other}"
    if value := ratio(record, "packed"):
        line += f"  packed takes {value:.2f}"
    return line


def means(records: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Geometric means over the shapes, per number of rows."""
    result: dict[int, dict[str, float]] = {}
    for rows in sorted({record["rows"] for record in records}):
        result[rows] = {}
        for other in ("float32", "fbgemm"):
            values = [value for record in records if record["rows"] == rows and (value := ratio(record, other))]
            if values:
                result[rows][other] = statistics.geometric_mean(values)
        result[rows]["share"] = statistics.geometric_mean(share(each) for each in records if each["rows"] == rows)
    return result


def overhead(seconds: float) -> dict[str, float]:
    """Seconds per call on an 8 x 8 layer, where nothing but the call counts."""
    layer, x = torch.nn.Linear(8, 8), torch.randn(1, 8)
    weight, bias = layer.weight.detach().half(), layer.bias.detach()
    with torch.no_grad():
        return interleaved(
            {"native": lambda _: native.linear(x, weight, bias), "nn.Linear": lambda _: layer(x)}, seconds
        )


def print_regions(waits: dict[str, float]) -> None:
    """One line: what it costs that threads wait for one another."""
    ways = {"team": "meeting at a barrier", "pool": "a region of the pool"}
    found = [f"{words} {1e6 * waits[way]:.2f} us" for way, words in ways.items() if way in waits]
    print(f"{torch.get_num_threads()} threads: {', '.join(found) or 'kept apart by other programs'}")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """GF/s and GB/s of weights over M, one line per shape, under the roof of the measured limits."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (flops, bytes_) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    rows = sorted({record["rows"] for record in records})
    read = statistics.median(record["read"] for record in records)
    top = statistics.median(record["multiply"] for record in records) / 1e9
    colours = plt.get_cmap("viridis")
    shapes = [shape for shape in SHAPES if any(tuple(r["shape"]) == shape for r in records)]
    for index, shape in enumerate(shapes):
        mine = [r for r in records if tuple(r["shape"]) == shape]
        weights = shape[0] * shape[1]
        style: dict[str, Any] = {"color": colours(index / len(shapes)), "marker": "o", "ms": 4}
        x = [r["rows"] for r in mine]
        for axis, unit in ((flops, True), (bytes_, False)):
            scale = [2e-9 * weights * (r["rows"] if unit else 1) for r in mine]
            native_rate = [s / r["seconds"]["native"] for s, r in zip(scale, mine, strict=True)]
            axis.plot(x, native_rate, label=f"{shape[0]} x {shape[1]}", **style)
            other = [s / r["seconds"]["float32"] for s, r in zip(scale, mine, strict=True)]
            axis.plot(x, other, color=style["color"], lw=0.8, ls=":")
    bound = [min(top, m * read / 1e9) for m in rows]
    flops.plot(rows, bound, "k--", lw=1.2, label="roof: reading weights, then multiply-adds in registers")
    bytes_.plot(rows, [b / m for b, m in zip(bound, rows, strict=True)], "k--", lw=1.2)
    for axis, title in ((flops, "GF/s"), (bytes_, "GB/s of float16 weights")):
        axis.set(xscale="log", yscale="log", xlabel="rows of x (M)", title=title)
        axis.set_xticks(rows, [str(m) for m in rows])
        axis.grid(alpha=0.3)
    flops.legend(fontsize=8)
    figure.suptitle(f"Native linear, cold weights ({native.info()['isa']}); dotted: float32 F.linear")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints the table and the geometric means beside their targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, four numbers of rows")
    parser.add_argument("--seconds", type=float, default=0.5, help="per shape and number of rows")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--chart", type=Path, help="draw GF/s and GB/s over M into this PNG")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*quantiz.*")
    torch.manual_seed(0)
    shapes, rows = (QUICK_SHAPES, QUICK_ROWS) if options.quick else (SHAPES, ROWS)
    seconds = min(options.seconds, 0.2) if options.quick else options.seconds
    print(native.info())
    call = overhead(seconds)
    print(f"8 x 8 layer: native {1e6 * call['native']:.1f} us, nn.Linear {1e6 * call['nn.Linear']:.1f} us")
    waits = limits.region_seconds()
    print_regions(waits)
    memory = limits.Memory()
    print_limits(memory)
    forward = [record for shape in shapes for record in measure_forward(shape, rows, seconds, memory)]
    backward = [record for shape in shapes for record in measure_backward(shape, rows, seconds, memory)]
    print("\ngeometric means   vs float32   vs FBGEMM   (targets)   of the limit   backward vs float32, of the limit")
    forward_means, backward_means = means(forward), means(backward)
    for m, values in forward_means.items():
        target = "({:.1f}, {:.2f})".format(*TARGETS[m]) if m in TARGETS else ""
        fbgemm = values.get("fbgemm", float("nan"))
        line = f"M {m:4}         {values['float32']:10.2f} {fbgemm:11.2f}   {target:12}"
        back = backward_means[m]
        print(f"{line} {100 * values['share']:8.0f} % {back['float32']:12.2f} {100 * back['share']:8.0f} %")
    if options.json:
        result = {"info": native.info(), "overhead": call, "regions": waits, "forward": forward, "backward": backward}
        options.json.write_text(json.dumps(result, indent=1))
    if options.chart:
        draw(forward, options.chart)


if __name__ == "__main__":
    main()

"""Fine-tuning measured: memory and time of a step in LitGPT and PEFT, and loss curves beside float32's, with a picture.

The whole suite takes about an hour on two cores; `--quick` takes four steps in place of two hundred.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import machine
from benchmarks.harness.chart import ACCENT, BAD, FAINT, PLAIN
from benchmarks.harness.training import Course, Job, measure, summary

ALLOWED = 1e-3  # how far a loss may be from float32's
STRESS = 4096
COLOURS = {"float32": PLAIN, "upcast": ACCENT, f"upcast x{STRESS}": "#E69F00", f"float16 x{STRESS}": BAD}
LIBRARIES = {"litgpt": "LitGPT", "transformers": "PEFT"}


def main(output: Path, quick: bool, threads: int | None) -> int:
    """Measure, print, write JSON and PNG to ``output``; return 0."""
    common: dict[str, Any] = {"threads": threads or 2}
    cost = {}
    for library, title in LIBRARIES.items():
        jobs = [Job(name, library, **common) for name in ("float32", "upcast")]
        cost[library] = measure(jobs, 4 if quick else 8)
        print(f"{title}\n{summary(cost[library])}", flush=True)
    jobs = [Job("float32", **common), Job("upcast", **common)]
    jobs += [Job(name, scale=STRESS, **common) for name in ("upcast", "float16")]
    curves = measure(jobs, 4 if quick else 200)
    print(f"loss curves\n{summary(curves)}")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "training.json"
    content = record(cost, curves, common["threads"])
    path.write_text(json.dumps(content) + "\n")
    print(f"{path}\n{draw(content, path.with_suffix('.png'))}")
    return 0


def record(cost: dict[str, dict[str, Course]], curves: dict[str, Course], threads: int) -> dict[str, Any]:
    """Return the content of the JSON file, in seconds and bytes."""
    facts = {"machine": machine.describe(), "versions": machine.versions(), "commit": machine.commit()}
    costs = {library: {name: asdict(course) for name, course in each.items()} for library, each in cost.items()}
    losses = {name: course.losses for name, course in curves.items()}
    return {"suite": "training", "threads": threads, **facts, "cost": costs, "losses": losses}


def draw(content: dict[str, Any], path: Path) -> Path:
    """Draw the loss curves, their distance from float32's, and the memory bars; return ``path``."""
    figure = Figure(figsize=(10, 5), dpi=160, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.6, 1], height_ratios=[1.5, 1])
    losses = content["losses"]
    curves = figure.add_subplot(grid[0, 0])
    _curves(curves, losses)
    _apart(figure.add_subplot(grid[1, 0], sharex=curves), losses)
    _memory(figure.add_subplot(grid[:, 1]), content["cost"])
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white")
    return path


def _curves(axis: Axes, losses: dict[str, list[float]]) -> None:
    axis.set_title("SmolLM2-135M, LoRA r=8, sequence 256, batch 4", loc="left", weight="bold")
    for name, values in losses.items():
        finite = [value for value in values if math.isfinite(value)]
        label = name if len(finite) == len(values) else f"{name}: NaN from step {len(finite) + 1}"
        steps = range(1, len(finite) + 1)
        wide = name == "float32"  # drawn below the others, which lie on it
        axis.plot(steps, finite, color=COLOURS.get(name), label=label, lw=4 if wide else 1.2, alpha=0.6 if wide else 1)
        if not finite:
            axis.plot([1], [max(losses["float32"])], "x", color=COLOURS.get(name))
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.tick_params(labelbottom=False)


def _apart(axis: Axes, losses: dict[str, list[float]]) -> None:
    for name, values in losses.items():
        apart = [max(abs(a - b), 1e-8) for a, b in zip(values, losses["float32"], strict=False)]
        if name != "float32" and apart and math.isfinite(apart[-1]):
            axis.plot(range(1, len(apart) + 1), apart, color=COLOURS.get(name), lw=1)
    axis.axhline(ALLOWED, color=FAINT, ls="--", lw=1)
    axis.annotate("allowed", (0.995, ALLOWED), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=FAINT)
    axis.set_yscale("log")
    axis.set_ylabel("from float32's")
    axis.set_xlabel("step")


def _memory(axis: Axes, cost: dict[str, dict[str, Any]]) -> None:
    axis.set_title("Peak memory of a step, MB", loc="left", weight="bold")
    rows = [
        (f"{LIBRARIES[library]}\n{name}", name, each) for library, both in cost.items() for name, each in both.items()
    ]
    for row, (_, name, each) in enumerate(rows):
        peak, weights = each["peak_bytes"] / 1e6, each["weight_bytes"] / 1e6
        axis.barh(row, peak, 0.6, color=COLOURS[name], alpha=0.35, lw=0)
        axis.barh(row, weights, 0.6, color=COLOURS[name], lw=0)
        axis.text(peak, row, f" {peak:,.0f}", va="center", weight="bold" if name == "upcast" else "normal")
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.set_xlim(0, 1.2 * max(each["peak_bytes"] for *_, each in rows) / 1e6)
    axis.set_xlabel("dark: the weights")
    axis.invert_yaxis()

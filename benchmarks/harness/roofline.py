"""The picture of decode beside its bound: milliseconds per token, and the least that reading the weights takes.

Beside each variant stands how much of the processor's multiply-adds its prefill keeps busy.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.chart import ACCENT, BAND, BAR, FAINT, INK, PLAIN
from benchmarks.harness.report import OURS

Bar = tuple[str, float, float]  # the variant, its milliseconds per token, and those of reading its weights


def bars(content: dict[str, Any]) -> list[Bar]:
    """Return a bar for each variant whose token reads a known number of bytes; none where no rate was measured."""
    if not content["read_rates"]:
        return []
    rate = statistics.median(content["read_rates"])
    return [
        (each["variant"], 1e3 * each["timings"]["decode_seconds"]["median"], 1e3 * each["bytes_per_token"] / rate)
        for each in content["variants"]
        if each["timings"]["decode_seconds"] and each["bytes_per_token"]
    ]


def prefill_shares(content: dict[str, Any]) -> dict[str, float]:
    """Return, for each variant, the least time of a prefill's products over what its prefill took; none unmeasured.

    The least time: two operations per matrix element and token, over the multiply-adds that the processor did in
    registers in the same rounds. Attention's own products do not count.
    """
    operations = next((each["prompt_operations"] for each in content["variants"] if each["prompt_operations"]), None)
    if not content["multiply_rates"] or not operations:
        return {}
    least = operations / statistics.median(content["multiply_rates"])
    timings = {each["variant"]: each["timings"]["prefill_seconds"] for each in content["variants"]}
    return {variant: least / found["median"] for variant, found in timings.items() if found}


def beside(record: Path) -> Path:
    """Return where the picture of a run lies whose JSON file is `record`."""
    return record.with_name(f"{record.stem}-roofline.png")


def in_words(content: dict[str, Any]) -> str:
    """Return what the picture shows, for those who do not see it; a sentence per variant."""
    rate = statistics.median(content["read_rates"]) / 1e9
    said = "; ".join(f"{name} {ms:.1f} of at least {bound:.1f}" for name, ms, bound in bars(content))
    words = f"Milliseconds per decoded token, and what reading the weights at {rate:.1f} GB/s takes of them: {said}."
    if not (shares := prefill_shares(content)):
        return words
    most = statistics.median(content["multiply_rates"]) / 1e9
    said = "; ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    return f"{words} Of {most:.0f} GFLOP/s in registers prefill's products use: {said}."


def draw(content: dict[str, Any], path: Path) -> Path | None:
    """Write the picture of `content` (see record.py) to `path`, a PNG; None where nothing is to be drawn."""
    found = bars(content)
    if not found:
        return None
    with mpl.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": INK}):
        figure = Figure(figsize=(9.6, 1.5 + 0.5 * len(found)), dpi=160)
        axis = figure.subplots()
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.16, right=0.97, top=1 - 0.98 / height, bottom=0.42 / height)
        _rows(axis, found, prefill_shares(content))
        _text(figure, content)
        figure.savefig(path, facecolor="white")
    return path


def _rows(axis: Axes, found: list[Bar], shares: dict[str, float]) -> None:
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(0, (1.75 if shares else 1.32) * max(max(ms, bound) for _, ms, bound in found))
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.set_yticks(range(len(found)), [name for name, _, _ in found])
    for row, (label, (name, ms, bound)) in enumerate(zip(axis.get_yticklabels(), found, strict=True)):
        ours = name in OURS
        color, ink, weight = (ACCENT, ACCENT, "bold") if ours else (PLAIN, INK, "normal")
        label.set(color=ink, fontweight=weight)
        if ours:
            axis.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, lw=0)
        axis.barh(row, ms, BAR, color=color, alpha=0.35, lw=0)
        axis.barh(row, min(bound, ms), BAR, color=color, lw=0)
        axis.plot([bound] * 2, [row - 0.4, row + 0.4], color=INK, lw=1.8)
        text = f"{ms:.1f} ms, reading: {100 * bound / ms:.0f} %"
        if name in shares:
            text += f"; prefill: {100 * shares[name]:.0f} % of multiply-adds"
        place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(text, (max(ms, bound), row), color=ink, weight=weight, fontsize=9, **place)


def _text(figure: Figure, content: dict[str, Any]) -> None:
    height, left = figure.get_figheight(), 0.015
    rate = statistics.median(content["read_rates"]) / 1e9
    title = "Decode: time per token, and the part that reading the weights must take"
    hint = f"line and full colour: bytes of the weights / {rate:.1f} GB/s, the reads of the same rounds; less is better"
    machine = content["machine"]["cpu"]
    facts = (
        f"{content['subject']['model']} on {machine}, {content['threads']} threads. Medians of "
        f"{content['effort']['rounds']} interleaved rounds. {content['date'][:10]}"
    )
    figure.text(left, 1 - 0.28 / height, title, fontsize=13, weight="bold", va="center")
    figure.text(left, 1 - 0.6 / height, hint, color=FAINT, fontsize=9, va="center")
    figure.text(left, 0.19 / height, facts, color=FAINT, fontsize=8, va="center")

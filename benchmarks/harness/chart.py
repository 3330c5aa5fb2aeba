"""The picture of one run: a row per variant, a column per question, drawn from the JSON content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from benchmarks.harness.report import OURS, prefill_rate
from benchmarks.harness.variants import BASELINE

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
ACCENT, PLAIN, BAD, GOOD = "#0072B2", "#8c8c8c", "#D55E00", "#009E73"
INK, FAINT, BAND = "#222222", "#777777", "#eaf3f9"
BAR = 0.56
NO_ERROR = 1e-8  # where the axis of errors begins; float32 itself resolves 6e-8

Variant = dict[str, Any]


def draw(content: dict[str, Any], path: Path) -> Path:
    """Write the chart of `content` (see record.py) to `path`, a PNG, and return `path`."""
    variants: list[Variant] = content["variants"]
    with mpl.rc_context({"font.size": 9.5, "font.family": "DejaVu Sans", "text.color": INK}):
        panels = [_memory, _decode, _prefill, _error]
        widths = [3.1, 2.3, 2.3, 2.0]
        if any(variant["stress"] for variant in variants):
            panels.append(_stress)
            widths.append(2.5)
        figure = Figure(figsize=(1.6 + sum(widths) * 1.12, 1.75 + 0.52 * len(variants)), dpi=160)
        axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _prepare(axis, variants)
            panel(axis, variants)
        _label_rows(axes[0], variants)
        _headline(figure, content)
        figure.savefig(path, facecolor="white")
    return path


def _headline(figure: Figure, content: dict[str, Any]) -> None:
    subject, machine = content["subject"], content["machine"]
    height = figure.get_figheight()
    figure.subplots_adjust(left=1.45 / figure.get_figwidth(), right=0.985, wspace=0.09)
    figure.subplots_adjust(top=1 - 1.12 / height, bottom=0.58 / height)
    left = 0.012
    figure.text(left, 1 - 0.28 / height, f"{subject['model']} on CPU", fontsize=15, weight="bold", va="center")
    figure.text(left, 1 - 0.55 / height, f"{subject['weights']}, through LitGPT", color=FAINT, va="center")
    torch_version = content["versions"]["torch"].split("+")[0]
    facts = (
        f"{machine['cpu']}, {content['threads']} threads, torch {torch_version}. Medians of "
        f"{content['effort']['rounds']} interleaved rounds, whiskers: quartiles. {content['date'][:10]}"
    )
    figure.text(left, 0.17 / height, facts, color=FAINT, fontsize=8, va="center")


def _prepare(axis: Axes, variants: list[Variant]) -> None:
    axis.set_ylim(len(variants) - 0.5, -0.5)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False, labelleft=False)
    for row, variant in enumerate(variants):
        if variant["variant"] in OURS:
            axis.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0, lw=0)


def _label_rows(axis: Axes, variants: list[Variant]) -> None:
    for row, variant in enumerate(variants):
        ours = variant["variant"] in OURS
        label = variant["variant"].replace("quantize_dynamic", "quantize_dynamic\n(torch, float16)")
        color = ACCENT if ours else INK
        weight = "bold" if ours else "normal"
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axis.annotate(label, (0, row), xytext=(-10, 0), ha="right", va="center", color=color, weight=weight, **place)


def _title(axis: Axes, title: str, hint: str) -> None:
    axis.annotate(title, (0, 1), xytext=(0, 20), xycoords="axes fraction", textcoords="offset points", weight="bold")
    axis.annotate(
        hint,
        (0, 1),
        xytext=(0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        color=FAINT,
        fontsize=8,
    )


def _colour(variant: Variant) -> str:
    return ACCENT if variant["variant"] in OURS else PLAIN


def _missing(axis: Axes, row: int, variant: Variant) -> None:
    word = "failed" if variant["status"] == "failed" else "not measured"
    axis.text(0, row, f" {word}", color=BAD, va="center", weight="bold")


def _memory(axis: Axes, variants: list[Variant]) -> None:
    _title(axis, "Memory, MB", "less is better")
    largest = max((v["peak_loading_bytes"] or v["weight_bytes"] or 1) for v in variants) / 1e6
    axis.set_xlim(0, largest * 1.28)
    for row, variant in enumerate(variants):
        weights, peak, steady = (variant[name] for name in ("weight_bytes", "peak_loading_bytes", "steady_bytes"))
        if weights is None:
            _missing(axis, row, variant)
            continue
        if peak is not None:
            axis.barh(row, peak / 1e6, BAR, color=_colour(variant), alpha=0.3, lw=0)
        axis.barh(row, weights / 1e6, BAR, color=_colour(variant), lw=0)
        if steady is not None:
            axis.plot([steady / 1e6] * 2, [row - BAR / 2, row + BAR / 2], color=INK, lw=1.8)
        numbers = f"{weights / 1e6:.0f}" + (f" / {peak / 1e6:.0f}" if peak is not None else "")
        _value(axis, max(weights, peak or 0, steady or 0) / 1e6, row, variant, numbers)
    keys: list[Patch | Line2D] = [
        Patch(color=PLAIN, label="weights"),
        Patch(color=PLAIN, alpha=0.3, lw=0, label="peak while loading"),
        Line2D([], [], color=INK, lw=1.8, label="steady"),
    ]
    options: dict[str, Any] = {"frameon": False, "fontsize": 8, "handlelength": 1.0, "columnspacing": 1.1}
    axis.legend(handles=keys, loc="upper left", bbox_to_anchor=(-0.03, 0.0), ncols=3, borderaxespad=0.2, **options)


def _value(axis: Axes, x: float, row: int, variant: Variant, text: str) -> None:
    ours = variant["variant"] in OURS
    axis.annotate(
        text,
        (x, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=ACCENT if ours else INK,
        weight="bold" if ours else "normal",
        fontsize=9,
    )


def _decode(axis: Axes, variants: list[Variant]) -> None:
    _title(axis, "Decode, ms per token", "less is better")
    _timed(axis, variants, "decode_seconds", lambda seconds: 1e3 * seconds, "{:.1f}")


def _prefill(axis: Axes, variants: list[Variant]) -> None:
    _title(axis, "Prefill, tokens per second", "more is better")
    _timed(axis, variants, "prefill_seconds", prefill_rate, "{:.0f}")


def _timed(axis: Axes, variants: list[Variant], name: str, convert: Callable[[float], float], form: str) -> None:
    longest = 0.0
    for row, variant in enumerate(variants):
        summary = variant["timings"][name]
        if summary is None:
            _missing(axis, row, variant)
            continue
        middle = convert(summary["median"])
        ends = sorted(convert(summary[quartile]) for quartile in ("lower_quartile", "upper_quartile"))
        axis.barh(row, middle, BAR, color=_colour(variant), lw=0)
        axis.plot(ends, [row, row], color=INK, lw=1.3, solid_capstyle="butt")
        _value(axis, max(middle, ends[1]), row, variant, form.format(middle))
        longest = max(longest, middle, ends[1])
    axis.set_xlim(0, longest * 1.25 or 1)


def _error(axis: Axes, variants: list[Variant]) -> None:
    _title(axis, "Logits error", "relative to float32, log scale")
    axis.set_xscale("log")
    axis.set_xlim(NO_ERROR, 3)
    for row, variant in enumerate(variants):
        error = variant["quality"] and variant["quality"]["relative_error"]
        if not error:
            word, color = _error_in_words(variant)
            axis.text(NO_ERROR, row, f" {word}", color=color, va="center")
            continue
        axis.plot([NO_ERROR, error], [row, row], color=_colour(variant), lw=1.2, alpha=0.5)
        axis.plot(error, row, "o", color=_colour(variant), ms=6)
        _value(axis, error, row, variant, _power(error))


def _error_in_words(variant: Variant) -> tuple[str, str]:
    """What stands in place of an error that no logarithmic axis can show, and its colour."""
    if variant["status"] == "failed":
        return "failed", BAD
    if variant["quality"] is None:
        return "not measured", FAINT
    if variant["quality"]["relative_error"] is None:
        return "not finite", BAD
    return ("the reference", FAINT) if variant["variant"] == BASELINE else ("0: bit for bit", _colour(variant))


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}·10$^{{{int(exponent)}}}$"


def _stress(axis: Axes, variants: list[Variant]) -> None:
    _title(axis, "Stress: residual stream times", "a scale that leaves float32's logits unchanged")
    scales = sorted({outcome["scale"] for variant in variants for outcome in variant["stress"]})
    axis.set_xlim(-0.5, len(scales) - 0.5)
    for row, variant in enumerate(variants):
        by_scale = {outcome["scale"]: outcome for outcome in variant["stress"]}
        for column, scale in enumerate(scales):
            _stress_cell(axis, column, row, by_scale.get(scale))
    for column, scale in enumerate(scales):
        axis.text(column, len(variants) - 0.42, f"x{scale}", ha="center", va="top", color=FAINT, fontsize=8)


def _stress_cell(axis: Axes, column: int, row: int, outcome: dict[str, Any] | None) -> None:
    corner = (column - 0.46, row - 0.36)
    if outcome is None:
        axis.text(column, row, "-", ha="center", va="center", color=FAINT)
        return
    broken = outcome["nonfinite_share"] > 0
    axis.add_patch(Rectangle(corner, 0.92, 0.72, color=BAD if broken else GOOD, alpha=0.9 if broken else 0.22, lw=0))
    text = "NaN" if broken else ("exact" if outcome["relative_error"] == 0 else _power(outcome["relative_error"]))
    color, weight = ("white", "bold") if broken else (INK, "normal")
    axis.text(column, row, text, ha="center", va="center", color=color, weight=weight, fontsize=8.5)

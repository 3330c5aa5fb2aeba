"""Pictures: headroom over depth, errors of policies, certificate, memory by layer. Needs the ``plot`` extra."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upcast.core.errors import UpcastError
from upcast.policy.policy import CLASSES

if TYPE_CHECKING:
    from upcast.analysis.certify import Certificate
    from upcast.analysis.diagnose import Diagnosis
    from upcast.analysis.report import Layer

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
COLOURS = dict(zip(CLASSES, ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#D55E00", "#56B4E9"), strict=True))
MARKERS = dict(zip(CLASSES, "osvD^P", strict=True))
OTHER, BAD, FAINT, INK = "#999999", "#D55E00", "#777777", "#222222"
FLOOR = -6.0  # bits; what is worse is drawn here


def figure(width: float, height: float) -> Any:
    """Return an empty figure, or say what is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UpcastError(
            "pictures need matplotlib, which is not installed. Run: pip install 'torch-upcast[plot]'."
        ) from None
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def headroom(diagnosis: "Diagnosis", path: Path) -> None:
    """Write the headroom of every operation over the order of execution, a colour and marker per op class."""
    drawing = figure(9.6, 4.2)
    axis = drawing.subplots()
    sites = [site for site in diagnosis.sites if site.largest > 0]
    top = max((min(site.headroom, 24.0) for site in sites), default=16.0) + 1
    lowest = min((site.headroom for site in sites), default=0.0)
    bottom = min(max(lowest, FLOOR), 0.0) - 1.5
    axis.axhspan(bottom, 0, color=BAD, alpha=0.12, lw=0)
    axis.text(0.995, 0.02, "overflows float16", color=BAD, ha="right", va="bottom", transform=axis.transAxes)
    for op_class in [None, *CLASSES]:
        chosen = [site for site in sites if site.op_class == op_class]
        if chosen:
            axis.plot(
                [site.order for site in chosen],
                [min(max(site.headroom, FLOOR), 24.0) for site in chosen],
                "." if op_class is None else MARKERS[op_class],
                color=OTHER if op_class is None else COLOURS[op_class],
                label=op_class or "other",
                ms=3 if op_class is None else 4.5,
                alpha=0.85,
                mew=0,
            )
    _name_culprit(axis, diagnosis)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("operations in the order of execution")
    axis.set_ylabel("headroom to 65,504, bits")
    axis.set_title(f"{diagnosis.model}: how far each operation is from float16's end", loc="left", fontsize=11)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    drawing.savefig(path, facecolor="white")


def _name_culprit(axis: Any, diagnosis: "Diagnosis") -> None:
    culprit = diagnosis.culprit
    if culprit is None:
        return
    named = (culprit.module, culprit.op_class, culprit.function)
    site = next((s for s in diagnosis.sites if (s.module, s.op_class, s.function) == named), None)
    if site is None:
        return
    left = site.order < len(diagnosis.sites) / 2
    axis.annotate(
        str(culprit),
        (site.order, max(site.headroom, FLOOR)),
        xytext=(14 if left else -14, 26),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=8.5,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": FAINT},
    )


class Bar(NamedTuple):
    """A policy's error relative to float32's (NaN where the result is not finite), in the colour of an op class."""

    label: str
    error: float
    op_class: str = ""
    faint: bool = False


def errors(bars: Sequence[Bar], title: str, path: Path, tolerance: float | None = None) -> None:
    """Write a bar per policy, and a line at the tolerance; what is not finite is said."""
    drawing = figure(8.4, 0.7 + 0.3 * len(bars))
    axis = drawing.subplots()
    finite = [bar.error for bar in bars if bar.error > 0 and math.isfinite(bar.error)]
    low = min(finite, default=1e-3) / 3
    axis.set_xscale("log")
    axis.set_xlim(low, (max([*finite, tolerance or 0.0]) or 1.0) * 6)
    for y, (_, error, op_class, faint) in enumerate(bars):
        colour = COLOURS.get(op_class, OTHER)
        if math.isfinite(error):
            axis.barh(y, max(error, low) - low, 0.62, left=low, color=colour, alpha=0.45 if faint else 1.0)
            axis.text(max(error, low) * 1.08, y, f"{error:.1e}", va="center", fontsize=8.5, color=INK)
        else:
            axis.text(low * 1.05, y, "not finite", va="center", fontsize=8.5, color=BAD, weight="bold")
    if tolerance is not None:
        axis.axvline(tolerance, color=FAINT, lw=1, ls="--")
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlabel("error relative to float32")
    axis.set_title(title, loc="left", fontsize=11)
    axis.tick_params(left=False)
    axis.tick_params(which="minor", labelbottom=False)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    drawing.savefig(path, facecolor="white")


def certificate(certified: "Certificate", path: Path) -> None:
    """Write one page: a panel per question, a bar per variant."""
    drawing = figure(11.0, 4.6)
    panels: list[tuple[str, str, list[float | None], str, bool]] = [
        ("logits error", "relative to float32", [row.error for row in certified.rows], "{:.0e}", True),
        ("KL divergence", "mean, nats", [row.kl for row in certified.rows], "{:.0e}", True),
        ("top-1 disagreement", "share", [_missed(row.top1) for row in certified.rows], "{:.1%}", False),
        ("perplexity", "on the text", [row.perplexity for row in certified.rows], "{:.3f}", False),
        ("weights", "MB", [row.weight_bytes / 1e6 for row in certified.rows], "{:.0f}", False),
        ("speed", "times float32's", [row.times_float32 for row in certified.rows], "{:.2f}", False),
    ]
    for axis, panel in zip(drawing.subplots(2, 3).flat, panels, strict=True):
        _bars(axis, [row.variant for row in certified.rows], *panel)
    drawing.suptitle(f"{certified.model}: precision certificate ({certified.positions:,} positions)", x=0.01, ha="left")
    drawing.savefig(path, facecolor="white")


def memory(layers: Sequence["Layer"], path: Path) -> None:
    """Write the bytes of each layer before the patch, and after it in float16 and in float32."""
    drawing = figure(max(6.4, min(0.28 * len(layers) + 2.0, 16.0)), 4.2)
    axis = drawing.subplots()
    places, after = range(len(layers)), [layer.float16 + layer.rest for layer in layers]
    axis.bar([x - 0.2 for x in places], [layer.before / 1e6 for layer in layers], 0.4, color=OTHER, label="before")
    axis.bar(
        [x + 0.2 for x in places],
        [layer.float16 / 1e6 for layer in layers],
        0.4,
        color=COLOURS["linear"],
        label="after, in float16",
    )
    axis.bar(
        [x + 0.2 for x in places],
        [layer.rest / 1e6 for layer in layers],
        0.4,
        bottom=[layer.float16 / 1e6 for layer in layers],
        color=COLOURS["scores"],
        label="after, in other dtypes",
    )
    total = f"{sum(layer.before for layer in layers) / 1e6:,.1f} MB before, {sum(after) / 1e6:,.1f} MB after"
    every = max(1, len(layers) // 40)
    axis.set_xticks(places[::every], [layer.name for layer in layers][::every], rotation=90, fontsize=7.5)
    axis.set_ylabel("MB")
    axis.set_title(f"Parameters and buffers: {total}", loc="left", fontsize=11)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    drawing.savefig(path, facecolor="white")


def _missed(share: float | None) -> float | None:
    return None if share is None else 1.0 - share


def _bars(
    axis: Any, names: list[str], title: str, unit: str, values: list[float | None], form: str, logarithmic: bool
) -> None:
    shown = [value for value in values if value]
    low = min(shown, default=1.0) / 5 if logarithmic else 0.0
    if logarithmic:
        axis.set_xscale("log")
    axis.set_xlim(low, max(shown, default=1.0) * (200 if logarithmic else 1.35))
    if not logarithmic:
        axis.locator_params(axis="x", nbins=4)
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None:
            axis.text(low, y, " not finite", va="center", color=BAD, weight="bold", fontsize=8.5)
            continue
        colour = COLOURS["linear"] if name.startswith("upcast") else OTHER
        if value > low:
            axis.barh(y, value - low, 0.6, left=low, color=colour)
        axis.text(max(value, low), y, f" {form.format(value)}", va="center", fontsize=8.5, color=INK)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(f"{title} ({unit})", loc="left", fontsize=9.5)
    axis.tick_params(left=False, labelsize=8.5)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)

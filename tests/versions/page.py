"""docs/versions.md: what ran under which version, written by the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.versions.matrix import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
HEAD = """# Versions

What `make test-versions` found, each version in an environment of its own; this page is written by that run. Small
models are run patched and not, on the same rounded weights: logits of a prompt and of single tokens after it, over
float32 caches (where the difference is taken) and float16 ones, gradients of adapters, loading under `UPCAST=1`, and
loading again what was saved, whose config names upcast. For LitGPT the story's script runs too, unmodified, beside a
synthetic checkpoint that has no finite logits in float16.

*Fused* says what ran on the native kernels: whole models or layers in one call, or their parts one by one. What a
version does not have costs that, never the program; `upcast.plan(model)` says why. Versions newer than the last one
here run unfused.

The ranges that `pyproject.toml` declares are from the first to the last version of each library here.

"""
FOOT = "The {rows} rows took {minutes} minutes, one after the other; that includes what pip downloads for each."
COLUMNS = ("library", "version", "what ran", "fused", "largest relative difference", "seconds")
# A fused forward -> what ran in one call.
WHOLE = {"FusedGPT": "models", "FusedDecoderLayer": "decode layers"}
PARTS = {
    "FusedAttention": "attention",
    "FusedGroupedAttention": "attention",
    "FusedGatedMLP": "MLPs",
    "FusedRMSNorm": "norms",
    "FusedLayerNorm": "norms",
    "FusedMoE": "experts",
    "FusedExperts": "experts",
    "FusedLoRAQKV": "LoRA",
}


def table(results: Mapping[str, Any]) -> str:
    """Return the table of all rows that have been run."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    lines += [_line(row.library, row.version, results[row.name]) for row in ROWS if row.name in results]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(results: Mapping[str, Any]) -> None:
    """Write the page."""
    minutes = sum(results[row.name]["whole"] for row in ROWS if row.name in results) / 60
    PAGE.write_text(f"{HEAD}{table(results)}\n\n{FOOT.format(rows=len(results), minutes=round(minutes))}\n")


def _line(library: str, version: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in result:
        return library, version, "failed", "", "", f"{result['whole']:.0f}"
    ran = ", ".join(result["ran"])
    if library == "torch":
        ran = ", ".join(result["ran"][:6]) + "; all of Transformers and LitGPT above"
    return library, version, ran, _fused(result["fused"]), f"{result['largest']:.0e}", f"{result['whole']:.0f}"


def _fused(counts: Mapping[str, int]) -> str:
    """Return which kinds ran fused; what the story ran is among them."""
    whole = [text for name, text in WHOLE.items() if counts.get(name)]
    parts = dict.fromkeys(text for name, text in PARTS.items() if counts.get(name))
    found = [f"{text} in one call" for text in whole] + list(parts)
    return ", ".join(found) or "no fused forwards here"

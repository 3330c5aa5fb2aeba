"""Write a measured run into README.md and docs/performance.md: tables between their markers, and the picture.

python benchmarks/harness/readme.py benchmarks/results/SmolLM2-135M-Instruct.json
python benchmarks/harness/readme.py benchmarks/results/SmolLM2-135M-Instruct-contexts.json   # or -batches: that table
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: make `benchmarks` importable

from benchmarks.harness import roofline, sweep
from benchmarks.harness.summary import summarise
from benchmarks.suites.registry import SWEEPS

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- benchmark: begin (written by benchmarks/harness/readme.py) -->"
END = "<!-- benchmark: end -->"
PICTURE, ROOFLINE = Path("docs/benchmark.png"), Path("docs/roofline.png")

HEADERS = (
    "",
    "weights",
    "peak while loading",
    "prefill",
    "decode",
    "logits error",
    "top-1",
    "NaN in the stress test",
)
SHORT = (0, 1, 4, 5, 7)  # the columns that the README has room for
MANUAL = Path("docs/performance.md")
PAGES = {Path("README.md"): SHORT, MANUAL: tuple(range(len(HEADERS)))}
"""Page -> the columns of its table."""
BEGIN_ROOFLINE, END_ROOFLINE = (mark.replace("benchmark:", "roofline:") for mark in (BEGIN, END))


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a benchmark run into README.md and docs/performance.md.")
    parser.add_argument("record", type=Path, help="the JSON file of a run; its PNG lies beside it")
    parser.add_argument("--roofline", action="store_true", help="only the picture of decode beside its bound")
    options = parser.parse_args()
    path = options.record
    if not path.is_file():
        print(f"no file {path}; run benchmarks/run.py first, it prints where its JSON file is.", file=sys.stderr)
        return 2
    record = json.loads(path.read_text())
    if (suite := record.get("suite")) in SWEEPS:
        begin, end = (mark.replace("benchmark:", f"{suite}:") for mark in (BEGIN, END))
        _replace(MANUAL, begin, end, sweep_section(record))
        return 0
    if not options.roofline:
        for page, columns in PAGES.items():
            _replace(page, BEGIN, END, section(record, columns, PICTURE.relative_to(page.parent)))
        shutil.copyfile(path.with_suffix(".png"), ROOT / PICTURE)
    drawn = roofline.beside(path)
    if drawn.is_file():
        text = f"\n![{roofline.in_words(record)}]({ROOFLINE.relative_to(MANUAL.parent)})\n"
        _replace(MANUAL, BEGIN_ROOFLINE, END_ROOFLINE, text)
        shutil.copyfile(drawn, ROOT / ROOFLINE)
    return 0


def _replace(page: Path, begin: str, end: str, written: str) -> None:
    """Write between the marks of a page."""
    before, _, rest = (ROOT / page).read_text().partition(begin)
    _, _, after = rest.partition(end)
    (ROOT / page).write_text(f"{before}{begin}\n{written}\n{end}{after}")


def section(record: dict[str, Any], columns: tuple[int, ...], picture: Path) -> str:
    """Return a page's section for one run: where and when, a table of these columns, the picture."""
    rows = [HEADERS, ("---",) + ("---:",) * (len(HEADERS) - 1), *rows_of(record)]
    table = "\n".join("| " + " | ".join(cells[column] for column in columns) + " |" for cells in rows)
    machine = record["machine"]
    setting = (
        f"{record['subject']['model']} in LitGPT on {machine['cpu']}, {record['threads']} threads, "
        f"torch {record['versions']['torch']}, {record['date'][:10]}; medians of interleaved rounds:"
    )
    return f"\n{setting}\n\n{table}\n\n![Memory, speed and stress test of every variant]({picture})\n"


def sweep_section(record: dict[str, Any]) -> str:
    """Return the section for a run of the contexts or the batches suite."""
    head, *rows = SWEEPS[record["suite"]].table(sweep.samples_of(record))
    rows = [[f"**{name}**" if name.startswith("upcast") else name, *cells] for name, *cells in rows]
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    read = summarise(record["read"]).median / 1e9
    setting = (
        f"{record['model']} in LitGPT on {record['machine']['cpu']}, {record['threads']} threads, "
        f"{record['date'][:10]}; memory was read at {read:.1f} GB/s; medians of interleaved rounds:"
    )
    return f"\n{setting}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def rows_of(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows; a variant that failed has none of its figures."""
    return [_row(variant, record["subject"]["prompt_tokens"]) for variant in record["variants"]]


def _row(variant: dict[str, Any], prompt_tokens: int) -> tuple[str, ...]:
    quality, timings, ratios = variant["quality"] or {}, variant["timings"], variant["ratios"]
    prefill, decode = (timings[f"{name}_seconds"] for name in ("prefill", "decode"))
    name = f"**{variant['variant']}**" if variant["variant"].startswith("upcast") else variant["variant"]
    return (
        name,
        f"{variant['weight_bytes'] / 1e6:,.0f} MB",
        f"{variant['peak_loading_bytes'] / 1e6:,.0f} MB",
        f"{prompt_tokens / prefill['median']:,.0f} tok/s ({1 / ratios['prefill_seconds']:.2f}x)" if prefill else "-",
        f"{1e3 * decode['median']:.1f} ms ({1 / ratios['decode_seconds']:.2f}x)" if decode else "-",
        f"{quality['relative_error']:.0e}" if quality.get("relative_error") is not None else "NaN",
        f"{quality['top1_agreement']:.1%}" if quality.get("top1_agreement") is not None else "-",
        _stress(variant["stress"]),
    )


def _stress(outcomes: list[dict[str, Any]]) -> str:
    failed = [f"{outcome['scale']:,}" for outcome in outcomes if outcome["nonfinite_share"]]
    return "at scale " + ", ".join(failed) if failed else "none" if outcomes else "-"


if __name__ == "__main__":
    sys.exit(main())

"""The JSON file: everything measured, each figure in its base unit (bytes, seconds), every sample kept."""

import dataclasses
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.session import Effort, Rates, Result
from benchmarks.harness.subject import QUESTION, Subject, fingerprint
from benchmarks.harness.variants import BASELINE, about

SCHEMA = 1
TIMINGS = ("prefill", "decode", "first_token")


def record(
    subject: Subject,
    effort: Effort,
    results: dict[str, Result],
    skipped_stress: str | None,
    seconds: float,
    rates: Rates | None = None,
) -> dict[str, Any]:
    """Return the content of the JSON file; `seconds` is what the whole run took, `rates` those of each round."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "threads": next((result.threads for result in results.values() if result.threads), None),
        "subject": {
            "model": subject.title,
            "weights": subject.weights,
            "text": subject.text,
            "tokens_sha256": fingerprint(subject),
            "prompt_tokens": len(subject.prompt),
            "chat_prompt": QUESTION,
            "chat_tokens": len(subject.chat),
        },
        "effort": dataclasses.asdict(effort),
        "run_seconds": seconds,
        "read_rates": rates.read if rates else [],
        "multiply_rates": rates.multiply if rates else [],
        "stress_skipped": skipped_stress,
        "variants": [variant_record(result, results.get(BASELINE), subject) for result in results.values()],
    }


def variant_record(result: Result, baseline: Result | None, subject: Subject) -> dict[str, Any]:
    """Everything about one variant; what a failure prevented is null or empty."""
    loading = dataclasses.asdict(result.loading) if result.loading else {}
    return {
        "variant": result.variant,
        "about": about(result.variant),
        "status": result.status,
        "failure": result.failure,
        "traceback": result.details or None,
        "weight_bytes": loading.get("weight_bytes"),
        "bytes_per_token": loading.get("bytes_per_token"),
        "prompt_operations": loading.get("prompt_operations"),
        "peak_loading_bytes": loading.get("peak_bytes"),
        "steady_bytes": result.steady_bytes,
        "timings": {f"{name}_seconds": _summary(result, name) for name in TIMINGS},
        "ratios": ratios(result, baseline) if baseline else {},
        "quality": dataclasses.asdict(result.quality) if result.quality else None,
        "stress": [dataclasses.asdict(outcome) for outcome in result.stress],
        "answer_tokens": list(result.answer or ()),
        "answer": subject.decode(list(result.answer)) if result.answer else None,
    }


def _summary(result: Result, name: str) -> dict[str, Any] | None:
    summary = result.timing(name)
    return dataclasses.asdict(summary) if summary else None


def ratios(result: Result, baseline: Result) -> dict[str, float | None]:
    """Each figure over float32's: below 1 is less memory or less time."""
    pairs: dict[str, Sequence[float | None]] = {
        "weight_bytes": [r.loading.weight_bytes if r.loading else None for r in (result, baseline)],
        "peak_loading_bytes": [r.loading.peak_bytes if r.loading else None for r in (result, baseline)],
        "steady_bytes": [result.steady_bytes, baseline.steady_bytes],
    }
    for name in TIMINGS:
        summaries = (result.timing(name), baseline.timing(name))
        pairs[f"{name}_seconds"] = [summary.median if summary else None for summary in summaries]
    return {name: ours / theirs if ours and theirs else None for name, (ours, theirs) in pairs.items()}

"""Samples and what is said about them: the median, and how far the samples spread around it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Median and spread of `samples`, in the samples' unit and order."""

    median: float
    minimum: float
    lower_quartile: float
    upper_quartile: float
    maximum: float
    samples: tuple[float, ...]


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of one sample or more; quartiles interpolate between samples."""
    if not samples:
        raise ValueError("no samples; a summary needs at least one. Measure at least one round.")
    if len(samples) == 1:
        lower = upper = samples[0]
    else:
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(statistics.median(samples), min(samples), lower, upper, max(samples), tuple(samples))

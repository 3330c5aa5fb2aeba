"""Measures how this machine reads weights best: ``python -m upcast tune``.

Contestants take turns over more weights than caches hold, so that a busy neighbour slows all alike; the median counts.
What upcast's table says stays unless something else is faster by more than noise.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.kernels import native, portable, tuning
from upcast.kernels.tuning import READINGS, Tuning

COLD_BYTES = 160 * 2**20  # of weights, more than any cache holds
SHAPES = ((1536, 576), (3072, 1024))  # short and long rows of weights
ROWS = (16, 32, 64, 128, 256)  # of x, for which torch's product may be faster
GAIN = 0.03  # below that a difference is noise
SECONDS = 2.0  # for either question
LEAST_ROUNDS = 5
PARTS = 1 + len(ROWS)  # of the measurement, for who shows how far it is


def measure(done: Callable[[], object] = lambda: None) -> tuple[Tuning, dict[str, Any]]:
    """Return what suits this machine best at the level in use, and the figures behind it. It takes some seconds.

    The figures: "gigabytes_per_second" of one row of x by reading, and "torch_over_native", the time of torch's product
    on upcast tiles as a multiple of ours, by rows of x. ``done`` is called after each of PARTS.

    Raises:
        UpcastError: there are no native kernels.
    """
    if not native.available():
        raise UpcastError(f"nothing to tune: {native.load_error()}. Portable kernels are torch's own operations.")
    before = tuning.in_use()
    try:
        tuning.use(None)
        usual = tuning.in_use()
        rates = _reading_rates()
        done()
        ratios = {}
        for rows in ROWS:
            ratios[rows] = _torch_over_native(rows)
            done()
    finally:
        tuning.use(before)
    best = max(rates, key=lambda reading: rates[reading])
    reading = best if rates[best] > (1 + GAIN) * rates[usual.reading] else usual.reading
    figures = {"gigabytes_per_second": rates, "torch_over_native": ratios, "threads": torch.get_num_threads()}
    return Tuning(reading, threshold(ratios)), figures


def threshold(ratios: dict[int, float]) -> int:
    """Return the fewest rows from which on torch is always faster by more than noise; 0 if there are none."""
    rows = 0
    for count in sorted(ratios, reverse=True):
        if ratios[count] > 1 - GAIN:
            return rows
        rows = count
    return rows


def _reading_rates() -> dict[str, float]:
    """Return reading -> 1e9 bytes of weights per second for one row of x."""
    weights = [weight for shape in SHAPES for weight in _cold(shape, COLD_BYTES // len(SHAPES))]
    rows = {shape[1]: torch.ones(1, shape[1]) for shape in SHAPES}

    def all_weights(reading: str) -> Callable[[], None]:
        def run() -> None:
            tuning.use(Tuning(reading, 0))
            for weight in weights:
                native.linear(rows[weight.shape[1]], weight)

        return run

    seconds = in_turns({reading: all_weights(reading) for reading in READINGS}, SECONDS)
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return {reading: round(size / taken / 1e9, 2) for reading, taken in seconds.items()}


def _torch_over_native(rows: int) -> float:
    """Return the time of torch's product on upcast tiles as a multiple of ours, for so many rows of x."""
    tuning.use(Tuning(READINGS[0], 0))
    pairs = [(torch.ones(rows, shape[1]), weight) for shape in SHAPES for weight in _cold(shape, COLD_BYTES // 10)]
    seconds = in_turns(
        {"native": lambda: _products(native.linear, pairs), "torch": lambda: _products(portable.linear, pairs)},
        SECONDS / len(ROWS),
    )
    return round(seconds["torch"] / seconds["native"], 3)


def _products(linear: Callable[[Tensor, Tensor], Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
    for x, weight in pairs:
        linear(x, weight)


def _cold(shape: tuple[int, int], size: int) -> list[Tensor]:
    """Return float16 weights of ``shape`` that take ``size`` bytes together, at least one."""
    return [torch.full(shape, 0.01, dtype=torch.float16) for _ in range(max(1, size // (2 * shape[0] * shape[1])))]


def in_turns(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call; they take turns for ``seconds`` together, in either order."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < LEAST_ROUNDS:
        for name in calls if rounds % 2 else reversed(calls):
            begin = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - begin)
        rounds += 1
    return {name: statistics.median(times) for name, times in taken.items()}

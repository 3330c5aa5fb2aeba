"""Rounding to float16, measured: what is lost, flushed to zero or out of range."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upcast.half_weight import FLOAT16_MAX, out_of_range

CHUNK = 1 << 18  # elements per step: stays in the second-level cache


@dataclass(frozen=True)
class Rounding:
    """What storing a tensor in float16 does to its numbers.

    Attributes:
        max_error: largest \\|w - float16(w)\\|, over the values that float16 can hold.
        flushed: values that are not zero and become zero.
        out_of_range: finite values beyond 65504, float16's largest.
        nonfinite: NaN and infinite values.
    """

    max_error: float = 0.0
    flushed: int = 0
    out_of_range: int = 0
    nonfinite: int = 0

    @property
    def lossless(self) -> bool:
        """Whether float16 holds every number exactly."""
        return self.max_error == 0.0 and self.fits

    @property
    def fits(self) -> bool:
        """Whether every number is finite and inside float16's range."""
        return not (self.out_of_range or self.nonfinite)


def survey(source: Tensor) -> Rounding:
    """Return how many values of ``source`` are out of float16's range or not finite (no rounding error yet)."""
    if not out_of_range(source):
        return Rounding()
    finite, in_range = 0, 0
    for piece in _pieces(source):
        magnitude = piece.abs()
        finite += int(torch.isfinite(magnitude).sum())
        in_range += int((magnitude <= FLOAT16_MAX).sum())
    return Rounding(out_of_range=finite - in_range, nonfinite=source.numel() - finite)


def to_half(source: Tensor, out: Tensor | None = None) -> tuple[Tensor, Rounding]:
    """Return ``source`` rounded to nearest in float16, and what that lost; ``source`` must fit (see `survey`).

    The numbers go to ``out``, a float16 tensor of the same shape, if there is one.
    """
    half = torch.empty_like(source, dtype=torch.float16) if out is None else out
    return half, _measure(source, half)


def measure(source: Tensor) -> Rounding:
    """Return what rounding ``source`` to float16 would do, without keeping the rounded numbers."""
    found = survey(source)
    return found if not found.fits else _measure(source, None)


def _measure(source: Tensor, half: Tensor | None) -> Rounding:
    if source.dtype == torch.float16:
        if half is not None:
            half.copy_(source)
        return Rounding()
    max_error, flushed, start = 0.0, 0, 0
    for piece in _pieces(source):
        rounded = piece.half()
        if half is not None:
            half[start : start + len(piece)] = rounded
        start += len(piece)
        exact = piece.double() if piece.dtype == torch.float64 else piece.float()
        stored = rounded.to(exact.dtype)
        flushed += int(torch.count_nonzero(exact) - torch.count_nonzero(stored))
        max_error = max(max_error, float(stored.sub_(exact).abs_().max()))
    return Rounding(max_error=max_error, flushed=flushed)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield ``tensor`` in slices of its first dimension of about CHUNK elements."""
    if tensor.numel():
        tensor, step = tensor.detach(), max(1, CHUNK * len(tensor) // tensor.numel())
        yield from (tensor[start : start + step] for start in range(0, len(tensor), step))

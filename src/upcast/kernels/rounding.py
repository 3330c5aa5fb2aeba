"""Rounding to float16, measured: what is lost, flushed to zero or out of range."""

from dataclasses import dataclass

import torch
from torch import Tensor

from upcast import kernels
from upcast.core.pages import Memory
from upcast.kernels.reference import Survey


@dataclass(frozen=True)
class Rounding:
    """What storing a tensor in float16 does to its numbers.

    Attributes:
        max_error: largest \\|w - float16(w)\\|, over the values that float16 can hold.
        flushed: values that are not zero and become zero.
        out_of_range: finite values beyond 65504, float16's largest.
        nonfinite: NaN and infinite values.
        escapes: of numbers stored in 12 bits, those that stand in a list of their own; None: it is float16.
        unpacked: why a tensor that was to be stored in 12 bits is not.
    """

    max_error: float = 0.0
    flushed: int = 0
    out_of_range: int = 0
    nonfinite: int = 0
    escapes: int | None = None
    unpacked: str = ""

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
    found = kernels.survey(source)
    return Rounding(out_of_range=found.out_of_range, nonfinite=found.nonfinite)


def to_half(source: Tensor, memory: Memory | None = None) -> tuple[Tensor, Rounding]:
    """Return ``source`` rounded to nearest in float16, and what that lost.

    The numbers go to ``memory``, if there is one. Those of a source that does not fit (see `survey`) are of no use.
    """
    half = torch.empty_like(source, dtype=torch.float16) if memory is None else memory.half_like(source)
    rounding = write_half(source, half)
    if memory is not None and not rounding.fits:
        memory.take_back(half)
    return half, rounding


def write_half(source: Tensor, out: Tensor) -> Rounding:
    """Write ``source`` to ``out``, float16 of the same shape, rounded to nearest; return what that lost."""
    return _rounding(kernels.survey(source, out))


def measure(source: Tensor) -> Rounding:
    """Return what rounding ``source`` to float16 would do, without keeping the rounded numbers."""
    if source.dtype == torch.float16:  # nothing; the kernels look at it much faster than they would round it
        return survey(source)
    return _rounding(kernels.survey(source, rounds=True))


def _rounding(found: Survey) -> Rounding:
    if found.out_of_range or found.nonfinite:
        return Rounding(out_of_range=found.out_of_range, nonfinite=found.nonfinite)
    return Rounding(found.max_error, found.flushed)

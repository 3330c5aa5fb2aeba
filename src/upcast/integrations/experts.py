"""A mixture of experts in one native call, whatever library its module is of."""

from torch import Tensor

from upcast import kernels
from upcast.core.errors import KernelError
from upcast.kernels import mixture, native
from upcast.kernels.block_spec import ExpertSpec

Specs = tuple[ExpertSpec | None, ...]
"""Of every expert; None may stand for one that nobody chose."""


def in_one_call(
    rows: Tensor, indices: Tensor, weights: Tensor, specs: Specs, activation: str, residual: Tensor | None = None
) -> Tensor | None:
    """Return the sum (T, C) of what the experts that ``indices`` (T, k) names give, weighted; in plain inference.

    ``residual`` (T, C) is added. None where the native call does not do it; ``specs`` is empty for experts that it does
    not know.
    """
    if not specs or kernels.active() is not native or native.prefers_torch(indices.numel() // len(specs)):
        return None
    try:
        return mixture.mixture(rows, indices, weights, specs, activation, residual)
    except KernelError:  # an expert that is none, say: the library has a result, or its error
        return None

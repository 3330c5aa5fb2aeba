"""Mixtures of experts: the choice of experts, and what the chosen ones give, each in one native call."""

import torch
from torch import Tensor

from upcast.kernels import native_library
from upcast.kernels.block_spec import ACTIVATIONS, ExpertSpec, Matrix, Norm
from upcast.kernels.native import _describe, _described, _named

_CPU = torch.device("cpu")
_threads = torch.get_num_threads
_native = native_library.native


@_named
def route(x: Tensor, norm: Norm, gate: Matrix, chosen: int) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of each row: the ``chosen`` ones that the gate scores highest, with the softmax of their scores.

    x: (T, C) float32. norm: what comes before. gate: (E, C). Of equal scores the first ones are taken. Returns (T, C)
    float32, normalised; (T, chosen) int64, the best first; (T, chosen) float32.
    """
    normed = torch.empty(x.shape, dtype=torch.float32, device=_CPU)
    indices = torch.empty((x.shape[0], chosen), dtype=torch.int64, device=_CPU)
    weights = torch.empty((x.shape[0], chosen), dtype=torch.float32, device=_CPU)
    given = (normed, indices, weights, x.contiguous())
    layers = (norm, gate) if native_library.exchange else _described((norm, gate))
    _native.route(*map(_describe, given), _threads(), *layers)
    return normed, indices, weights


@_named
def mixture(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    experts: tuple[ExpertSpec | None, ...],
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what the chosen experts give: sum_j weights[t, j] * expert[indices[t, j]](x[t]).

    x: (T, C) float32. indices: (T, k) int64, of ``experts``. weights: (T, k) float32. activation: one of ACTIVATIONS.
    residual: (T, C) float32, which the sum begins with. Experts that nobody chose are not looked at, and may be None;
    those of a row are added up in their order. Returns (T, C) float32.
    """
    out = torch.empty(x.shape, dtype=torch.float32, device=_CPU)
    given = (out, x.contiguous(), indices.contiguous(), weights.contiguous())
    before = None if residual is None else residual.contiguous()
    specs = experts if native_library.exchange else _described(experts)
    _native.mixture(*map(_describe, given), _threads(), ACTIVATIONS[activation], specs, _describe(before))
    return out

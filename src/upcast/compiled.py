"""The kernels as custom operators, for torch.compile: eager code never comes this way.

Inductor sees each product with a float16 weight as one opaque operator; what surrounds it is compiled as usual.
Operators cost several microseconds each in eager mode, so they are used only while something traces.
"""

import torch
from torch import Tensor

from upcast import kernels


@torch.library.custom_op("upcast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32: x float32 (..., K), weight float16 (N, K), bias float32 (N,)."""
    return kernels.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep_weight(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    _, weight, bias = inputs
    assert isinstance(weight, Tensor)
    ctx.save_for_backward(weight)
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _linear_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
    (weight,) = ctx.saved_tensors  # type: ignore[attr-defined]
    to_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None  # type: ignore[attr-defined]
    return torch.ops.upcast.linear(grad, weight.t()), None, to_bias


linear.register_autograd(_linear_backward, setup_context=_keep_weight)


@torch.library.custom_op("upcast::embedding", mutates_args=())
def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Return rows of ``weight`` (float16, (V, D)) at ``indices`` (integers, any shape) in float32."""
    return kernels.embedding(indices, weight)


@embedding.register_fake
def _(indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=torch.float32)


@torch.library.custom_op("upcast::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return ``x[rows of e] @ weight[e]`` for every expert e: x float32 (T, K), weight float16 (E, K, N)."""
    return kernels.grouped_linear(x, weight, counts)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])

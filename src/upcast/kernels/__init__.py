"""Kernels: float16 weights times float32 activations, and which implementation runs.

`portable` is plain PyTorch and runs everywhere. Both implementations have the same functions; what differentiates
and what chooses between them is here.
"""

from typing import Any

import torch

from upcast import config
from upcast.errors import UpcastError
from upcast.kernels import portable

_backend = portable


def name() -> str:
    """Return the name of the implementation in use."""
    return "portable"


def use(choice: str) -> None:
    """Choose the implementation: ``auto``, ``native`` or ``portable``.

    Raises:
        UpcastError: ``choice`` is none of these, or native kernels were asked for and are not there.
    """
    if choice not in config.KERNELS:
        raise UpcastError(f"kernels {choice!r}; it must be one of {', '.join(config.KERNELS)}. Use 'auto'.")
    if choice == "native":
        raise UpcastError(
            "native kernels were asked for, but this build has none; upcast never replaces them in silence. "
            "Use UPCAST_KERNELS=auto or UPCAST_KERNELS=portable."
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` in float32: x float32 (..., K), weight float16 (N, K), bias float32 (N,).

    Differentiable with respect to x and bias; only the float16 weight is kept for the backward pass.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: torch.Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return _backend.linear(x, weight, bias)


def embedding(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows of ``weight`` (float16, (V, D)) at ``indices`` (integers, any shape) in float32."""
    return _backend.embedding(indices, weight)


class _Linear(torch.autograd.Function):
    """y = x W^T with a frozen float16 W: dX = dY W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _backend.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return linear(grads[0], weight.t()), None

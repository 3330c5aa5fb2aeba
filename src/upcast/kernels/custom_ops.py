"""The kernels as custom operators, for torch.compile: eager code never comes this way.

Inductor sees each product with a float16 weight as one opaque operator; what surrounds it is compiled as usual.
Operators cost several microseconds each in eager mode, so they are used only while something traces.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import wrapt
from torch import Tensor
from torch._decomp import register_decomposition

from upcast import kernels
from upcast.core.errors import UpcastError
from upcast.kernels import packed
from upcast.kernels.packed_matrix import PackedMatrix


@torch.library.custom_op("upcast::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32: x float32 (..., K), weight float16 (N, K), bias float32 (N,)."""
    return kernels.unfollowed_linear(x, weight, bias)


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


@linear.register_vmap
def _(info: object, dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if dims[0] is None or dims[1] is not None or (bias is not None and dims[2] is not None):
        raise UpcastError(
            "vmap over a weight that is stored in float16; samples share the weights. Map over float32 ones, which "
            "upcast.unpatch(model) gives."
        )
    return torch.ops.upcast.linear(x.movedim(dims[0], 0), weight, bias), 0


# --- packed weights: their bytes, and what `PackedMatrix` says of them ------------------------------------------------


def _matrix(blob: Tensor, form: Sequence[int]) -> PackedMatrix:
    rows, columns, escapes, begin, count, transposed = form
    return PackedMatrix(blob, rows, columns, escapes, begin, count, bool(transposed))


@torch.library.custom_op("upcast::unpack", mutates_args=())
def unpack(blob: Tensor, form: list[int]) -> Tensor:
    """Return the numbers of a packed matrix in bfloat16; form: the fields of `PackedMatrix` after the first."""
    return packed.unpack(_matrix(blob, form)).contiguous()


@unpack.register_fake
def _(blob: Tensor, form: list[int]) -> Tensor:
    return blob.new_empty(_matrix(blob, form).shape, dtype=torch.bfloat16)


@torch.library.custom_op("upcast::packed_linear", mutates_args=())
def packed_linear(x: Tensor, blob: Tensor, form: list[int], bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32 for a packed matrix (N, K): x float32 (..., K), bias float32 (N,)."""
    return packed.linear(x, _matrix(blob, form), bias)


@packed_linear.register_fake
def _(x: Tensor, blob: Tensor, form: list[int], bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _matrix(blob, form).shape[0]))


def _keep_packed(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, blob, ctx.form, bias = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(blob)
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    (blob,) = ctx.saved_tensors
    to_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias else None
    back = _matrix(blob, ctx.form).t()
    return torch.ops.upcast.packed_linear(grad, blob, [*back[1:]]), None, None, to_bias


packed_linear.register_autograd(_packed_backward, setup_context=_keep_packed)


@torch.library.custom_op("upcast::packed_embedding", mutates_args=())
def packed_embedding(indices: Tensor, blob: Tensor, form: list[int]) -> Tensor:
    """Return rows of a packed matrix (V, D) at ``indices`` (integers, any shape) in float32."""
    return packed.embedding(indices, _matrix(blob, form))


@packed_embedding.register_fake
def _(indices: Tensor, blob: Tensor, form: list[int]) -> Tensor:
    return blob.new_empty((*indices.shape, _matrix(blob, form).columns), dtype=torch.float32)


@register_decomposition(torch.ops.upcast.linear.default)  # for ONNX, which asks torch's table of decompositions
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight.float(), bias)


@torch.library.custom_op("upcast::embedding", mutates_args=())
def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Return rows of ``weight`` (float16, (V, D)) at ``indices`` (integers, any shape) in float32."""
    return kernels.unfollowed_embedding(indices, weight)


@embedding.register_fake
def _(indices: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=torch.float32)


@embedding.register_vmap
def _(info: object, dims: tuple[int | None, ...], indices: Tensor, weight: Tensor) -> Any:
    assert dims[0] is not None
    return torch.ops.upcast.embedding(indices.movedim(dims[0], 0), weight), 0


@register_decomposition(torch.ops.upcast.embedding.default)
def _(indices: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.embedding(indices, weight).float()


@torch.library.custom_op("upcast::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return ``x[rows of e] @ weight[e]`` for every expert e: x float32 (T, K), weight float16 (E, K, N)."""
    return kernels.unfollowed_grouped_linear(x, weight, counts)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _keep_experts(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _experts_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
    weight, counts = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.upcast.grouped_linear(grad, weight.mT, counts), None, None


grouped_linear.register_autograd(_experts_backward, setup_context=_keep_experts)


def _linear_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _packed_flops(x: torch.Size, blob: torch.Size, form: Sequence[int], *_: object, **__: object) -> int:
    return 2 * math.prod(x) * _matrix(torch.empty(0), form).shape[0]


def _experts_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[2]


def _counted(counter: Any) -> None:
    counter.register_flop_formula(torch.ops.upcast.linear)(_linear_flops)
    counter.register_flop_formula(torch.ops.upcast.packed_linear)(_packed_flops)
    counter.register_flop_formula(torch.ops.upcast.grouped_linear)(_experts_flops)


def _opaque(lowering: Any) -> None:
    """Tell Inductor to call these as they are: where ``CI`` is set, it refuses an operator that it could decompose."""
    if hasattr(lowering, "make_fallback"):
        for name in ("linear", "embedding", "packed_linear"):
            lowering.make_fallback(getattr(torch.ops.upcast, name).default, warn=False)


wrapt.register_post_import_hook(_opaque, "torch._inductor.lowering")
wrapt.register_post_import_hook(_counted, "torch.utils.flop_counter")  # it imports triton, which needs a GIL

"""What differentiates through the kernels: one autograd function per kernel that has a backward of its own.

Weights are frozen, and kept for the backward pass as the float16 tensors that they are. Beyond that each function keeps
its inputs and nothing else: what torch would keep of the steps in between is computed again, from numbers that are in
memory anyhow. `upcast.kernels` decides when these run; here is only how.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upcast.kernels import packed, reference, transforms
from upcast.kernels.packed_matrix import PackedMatrix

_aten = torch.ops.aten


def _silu_slope(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _aten.silu_backward(grad, x)  # type: ignore[no-any-return]
    sigmoid = torch.sigmoid(x)  # torch's own cannot be differentiated once more
    return grad * sigmoid * (1 + x * (1 - sigmoid))


_SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # gradient of the result and input -> gradient of the input
    "silu": _silu_slope,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
}
Operand = Tensor | PackedMatrix
Product = Callable[[Tensor, Operand], Tensor]


class Linear(torch.autograd.Function):
    """y = x W^T with a frozen float16 W: dX = dY W. ``product(x, W)`` is `upcast.kernels.linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Operand, product: Product) -> Tensor:
        _keep(ctx, weight)
        ctx.product = product
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight: Operand = ctx.saved_tensors[0] if ctx.packed is None else ctx.packed
        if transforms.is_old_batch(grads[0]):
            wide = packed.unpack(weight) if isinstance(weight, PackedMatrix) else weight
            return grads[0] @ wide.float(), None, None
        return ctx.product(grads[0], weight.t()), None, None


class Opaque:
    """A packed matrix on its way through torch.func, which would put the tensor in it into one of its own."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix


def opaque(weight: Operand) -> Tensor | Opaque:
    """Return a weight as torch.func is to see it."""
    return Opaque(weight) if isinstance(weight, PackedMatrix) else weight


def _inside(weight: Tensor | Opaque) -> Operand:
    return weight.matrix if isinstance(weight, Opaque) else weight


def _keep(ctx: Any, weight: Operand) -> None:
    """Keep a weight for the backward pass; the bytes of a packed one are never written."""
    ctx.packed = weight if isinstance(weight, PackedMatrix) else None
    ctx.save_for_backward(*(() if isinstance(weight, PackedMatrix) else (weight,)))


class NestedLinear(torch.autograd.Function):
    """`Linear` as torch.func wants it; a way of its own, because each call looks up the names of its arguments."""

    backward = Linear.backward

    @staticmethod
    def forward(x: Tensor, weight: Tensor | Opaque, product: Product) -> Tensor:
        return product(x, _inside(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, ctx.product = inputs
        _keep(ctx, _inside(weight))

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor | Opaque, product: Product) -> tuple[Tensor, int]:
        """Take the samples for one more dimension of x; weights are one for all of them."""
        return product(x.movedim(dims[0], 0), _inside(weight)), 0


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w with a frozen w: of a step, x alone is kept."""

    @staticmethod
    def forward(ctx: Any, implementation: Any, x: Tensor, weight: Tensor | None, eps: float, unit_offset: bool) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.unit_offset = eps, unit_offset
        return implementation.rms_norm(x, weight, eps, unit_offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        if weight is not None:
            grad = grad * (weight + 1 if ctx.unit_offset else weight)
        size = x.shape[-1]
        factor = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / size + ctx.eps)
        along = (grad * x).sum(-1, keepdim=True) * factor.pow(3) / -size
        return None, torch.addcmul(grad * factor, x, along), None, None, None


class Gated(torch.autograd.Function):
    """y = activation(gate) * up: gate and up are kept, the activation is made again."""

    @staticmethod
    def forward(ctx: Any, implementation: Any, gate: Tensor, up: Tensor, activation: str) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return implementation.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        to_gate = to_up = None
        if ctx.needs_input_grad[1]:
            to_gate = _SLOPES[ctx.activation](grads[0] * up, gate)
        if ctx.needs_input_grad[2]:
            to_up = reference.gated(gate, grads[0], ctx.activation)
        return None, to_gate, to_up, None


class Rope(torch.autograd.Function):
    """Rotary embedding: nothing of x is kept, since the gradient is turned back by the same kernel."""

    @staticmethod
    def forward(ctx: Any, implementation: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.implementation = implementation
        return implementation.rope(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        back = -sin.roll(sin.shape[-1] // 2, -1)  # the transposed turn, for halves that turn by different angles too
        if transforms.active() or transforms.is_old_batch(grads[0]):
            return None, reference.rope(grads[0], cos, back), None, None
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return None, Rope.apply(ctx.implementation, grad, cos, back), None, None  # type: ignore[no-untyped-call]


class CausalAttention(torch.autograd.Function):
    """torch's own flash attention, forward and backward; keys and values are kept once per group of query heads."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        out, sums = _flash(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more, which torch's own kernel cannot
            return *_attention_slopes(ctx.needs_input_grad, (q, k, v), grads[0], ctx.scale), None
        group = q.shape[1] // k.shape[1]
        to_q, to_k, to_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0], q, _repeated(k, group), _repeated(v, group), out, sums, 0.0, True, scale=ctx.scale
        )
        return to_q, _summed(to_k, group), _summed(to_v, group), None


def _attention_slopes(wanted: Any, inputs: tuple[Tensor, ...], grad: Tensor, scale: float) -> list[Tensor | None]:
    """Return the gradients of attention from the steps of its definition, so that they have gradients themselves."""
    inputs = tuple(x.view_as(x) for x in inputs)  # one of them may come from another
    out = reference.attention(*inputs, start=0, scale=scale)
    chosen = [x for x, wants in zip(inputs, wanted, strict=False) if wants]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return [next(found) if wants else None for _, wants in zip(inputs, wanted, strict=False)]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    result: tuple[Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, _repeated(k, group), _repeated(v, group), 0.0, True, scale=scale
    )
    return result


def _repeated(x: Tensor, group: int) -> Tensor:
    """Return (B, H * group, T, D): each head for all the query heads of its group."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _summed(grad: Tensor, group: int) -> Tensor:
    return grad if group == 1 else grad.reshape(grad.shape[0], -1, group, *grad.shape[2:]).sum(2)

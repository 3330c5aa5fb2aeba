"""The fused kernels in plain PyTorch: what `native` must agree with, and what runs without it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: (..., D); weight, bias: (D,) or None."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last dimension. x: (..., D); weight: (D,) or None, 1 + weight with unit_offset."""
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed
    return normed * (weight + 1 if unit_offset else weight)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, with activation one of "silu", "gelu", "gelu_tanh"."""
    return _ACTIVATIONS[activation](gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first n = cos.shape[-1] elements of x (B, H, T, D); cos, sin: ([B,] T, n)."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        swapped = torch.cat((-high, low), dim=-1)
    return torch.cat((turned * cos + swapped * sin, rest), dim=-1)


def _visible(start: int, time: int, causal: bool, window: int | None) -> Tensor:
    """(T, start + T) bool: which positions each query sees."""
    query = torch.arange(start, start + time).unsqueeze(1)
    key = torch.arange(start + time)
    seen = key <= query if causal else torch.ones(time, start + time, dtype=torch.bool)
    return seen & (key > query - window) if window else seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of q (B, Hq, T, D) over positions 0 .. start + T - 1 of k and v (B, Hkv, S, D), in q's dtype."""
    time, end = q.shape[2], start + q.shape[2]
    group = q.shape[1] // k.shape[1]
    keys = k[:, :, :end].to(q.dtype).repeat_interleave(group, dim=1)
    values = v[:, :, :end].to(q.dtype).repeat_interleave(group, dim=1)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(start, time, causal, window), float("-inf"))
    return torch.softmax(scores, dim=-1) @ values


def kv_append(cache: Tensor, new: Tensor, start: int) -> bool:
    """Write new (B, Hkv, T, D) into cache at start, unless a finite value would become infinite there."""
    stored = new.to(cache.dtype)
    if bool((stored.isinf() & new.isfinite()).any()):
        return False
    cache[:, :, start : start + new.shape[2]] = stored
    return True

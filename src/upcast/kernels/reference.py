"""The fused kernels in plain PyTorch: what `native` must agree with, and what runs without it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from upcast.core.functional import F

FLOAT16_MAX = torch.finfo(torch.float16).max  # 65504
TINY = 2.0**-25  # and below, float16 rounds to zero

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: (..., D); weight, bias: (D,) or None."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)  # type: ignore[no-any-return]


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
    width = cos.shape[-1]
    turned, rest = x.narrow(-1, 0, width), x.narrow(-1, width, x.shape[-1] - width)
    if interleaved:
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        swapped = torch.cat((-high, low), dim=-1)
    return torch.cat((turned * cos + swapped * sin, rest), dim=-1)


def _visible(start: int, time: int, causal: bool, window: int | None) -> Tensor:
    """(T, start + T) bool: which positions each query sees."""
    query = torch.arange(start, start + time, device="cpu").unsqueeze(1)
    key = torch.arange(start + time, device="cpu")
    seen = key <= query if causal else torch.ones(time, start + time, dtype=torch.bool, device="cpu")
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
    """Attention of q (B, Hq, T, D) over start + T positions of k and v (B, Hkv, S, D), in q's dtype."""
    time, end = q.shape[2], start + q.shape[2]
    group = q.shape[1] // k.shape[1]
    keys = k[:, :, :end].to(q.dtype).repeat_interleave(group, dim=1)
    values = v[:, :, :end].to(q.dtype).repeat_interleave(group, dim=1)
    scores = q @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(start, time, causal, window), float("-inf"))
    return torch.softmax(scores, dim=-1) @ values


def beyond(new: Tensor, limit: float) -> bool:
    """Whether a position of new (B, H, T, D) has a finite root mean square over all heads of more than ``limit``."""
    squares = new.square().mean(dim=(1, 3))
    return bool(((squares > limit * limit) & squares.isfinite()).any())


def kv_append(cache: Tensor, new: Tensor, start: int, limit: float = 0.0) -> bool:
    """Write new (B, Hkv, T, D) into cache at start, unless a finite value would become infinite there.

    Nor if, in float16, a position is beyond ``limit``.
    """
    stored = new.to(cache.dtype)
    if bool((stored.isinf() & new.isfinite()).any()):
        return False
    if limit > 0 and cache.dtype == torch.float16 and beyond(new, limit):
        return False
    cache[:, :, start : start + new.shape[2]] = stored
    return True


class Survey(NamedTuple):
    """What numbers are, and what float16 does to them.

    Attributes:
        largest: magnitude of a finite number.
        max_error: largest \\|x - float16(x)\\|, over those that float16 can hold; 0 unless they were rounded.
        nonfinite: NaN and infinite ones.
        out_of_range: finite ones beyond 65504, float16's largest.
        nonzero: those that are not zero (NaN does not count).
        flushed: those that are not zero and become zero in float16.
    """

    largest: float = 0.0
    max_error: float = 0.0
    nonfinite: int = 0
    out_of_range: int = 0
    nonzero: int = 0
    flushed: int = 0


def survey(x: Tensor, out: Tensor | None = None, *, rounds: bool = False) -> Survey:
    """Look at x (any shape, any floating dtype); write it to out, float16 of the same shape, if there is one.

    max_error is found with an out, and where ``rounds`` asks for it.
    """
    if not x.numel():
        return Survey()
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 has no 65504 to compare with
    magnitude = x.abs()
    finite = magnitude.isfinite()
    sizes = torch.where(finite, magnitude, 0)
    nonzero, kept = int(sizes.count_nonzero()), int((sizes > TINY).count_nonzero())
    nonfinite = x.numel() - int(finite.count_nonzero())
    beyond = int((sizes > FLOAT16_MAX).count_nonzero())
    found = Survey(float(sizes.max()), 0.0, nonfinite, beyond, nonzero + int(x.isinf().count_nonzero()), nonzero - kept)
    if rounds or out is not None:
        return found._replace(max_error=_rounded(x, torch.empty_like(x, dtype=torch.float16) if out is None else out))
    return found


def _rounded(x: Tensor, out: Tensor) -> float:
    out.copy_(x)
    off = (out.to(x.dtype) - x).abs()
    return float(torch.where(x.abs() <= FLOAT16_MAX, off, 0).max())


def add(surveys: list[Survey]) -> Survey:
    """Return the survey of all parts of a tensor."""
    largest, max_error, *counts = zip(*surveys, strict=True)
    return Survey(max(largest), max(max_error), *map(sum, counts))

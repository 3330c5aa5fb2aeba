"""Scaled dot-product attention over keys and values that are stored in float16.

A float16 KV cache hands its rows out as `HalfWeight`; here they meet the queries. What the native kernel covers reads
float16 directly. Everything else upcasts the rows in use, and torch computes.
"""

from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.core.functional import F
from upcast.kernels import transforms
from upcast.tensor import autocast
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.upcasting import call_upcast
from upcast.tensor.view_ops import handles

# The largest root mean square of one position's keys or values, over all heads, that is for float16. What rounding
# changes in the scores grows with the keys; how much of it reaches the logits, with the share that values have in the
# residual stream. Up to here logits differ by at most 1e-3, measured on models of random weights, which feel it most;
# SmolLM2's largest are 3.5 and 3.6.
KEY_LIMIT, VALUE_LIMIT = 4.0, 8.0
WHY_FLOAT32 = "its keys or values are too large for float16's precision, or beyond 65504, where it ends"


@handles(F.scaled_dot_product_attention)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if isinstance(key, HalfWeight) and isinstance(value, HalfWeight) and _covered(query, key, value, dropout_p):
        rows = rows_in_use(attn_mask, query, key)
        if rows is not None and not (is_causal and query.shape[2] != rows):
            keys, values = (each.memory_for_attention()[:, :, :rows] for each in (key, value))
            return over_cache(query, keys, values, scale, causal=is_causal)
    options = {"scale": scale, **({"enable_gqa": True} if enable_gqa else {})}
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    return call_upcast(F.scaled_dot_product_attention, args, options)


def _covered(query: Tensor, key: HalfWeight, value: HalfWeight, dropout: float) -> bool:
    """Whether the kernel takes these: (B, H, T, D), one batch, whole groups of heads, and nobody needs a gradient."""
    if type(query) is not Tensor or query.dtype != torch.float32 or dropout or transforms.active():
        return False
    if query.is_nested or autocast.enabled():  # autocast rounds all three, and the result
        return False
    keys, values = key.outline, value.outline
    if (torch.is_grad_enabled() and query.requires_grad) or {query.dim(), keys.dim(), values.dim()} != {4}:
        return False
    same = keys.shape[:3] == values.shape[:3] and keys.shape[0] == query.shape[0] and keys.shape[3] == query.shape[3]
    return same and keys.shape[2] > 0 and query.shape[1] % keys.shape[1] == 0 and keys.stride(3) == 1


def rows_in_use(mask: Tensor | None, query: Tensor, key: Tensor) -> int | None:
    """Return how many rows every query sees, counted from the first; None if ``mask`` says anything else."""
    if mask is None:
        return key.shape[2]
    if mask.dtype != torch.bool or query.shape[2] != 1 or mask.dim() != 4:
        return None
    seen = mask[:, :, -1, :]
    rows = int(seen[0, 0].sum())
    return rows if rows and bool(seen[..., :rows].all()) and not bool(seen[..., rows:].any()) else None


def over_cache(query: Tensor, keys: Tensor, values: Tensor, scale: float | None, *, causal: bool) -> Any:
    """Return attention of T queries over S float16 rows (B, Hkv, S, D): all of them, or causal with S = T."""
    start = keys.shape[2] - query.shape[2]
    if start < 0:  # fewer rows than queries, and all are seen: the kernel counts positions from the first row
        return F.scaled_dot_product_attention(query, keys.float(), values.float(), scale=scale, enable_gqa=True)
    return kernels.active().attention(query, keys, values, start=start, scale=scale, causal=causal)

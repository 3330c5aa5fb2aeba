"""The kernels in plain PyTorch: the portable path, and the references of the native ones.

Weights are upcast in tiles of about a million elements into a scratch that is used again and again, so that no
float32 copy of a large weight ever exists. Figures behind the tile size: 256 K elements lose 40 % on a large output
projection, whole weights lose 50 %.
"""

import threading

import torch

from upcast.core.functional import F
from upcast.kernels import reference

TILE = 1 << 20
CHUNK = 1 << 18  # numbers looked at in one step: they stay in the second-level cache

attention, kv_append, rope = reference.attention, reference.kv_append, reference.rope
gated, layer_norm, rms_norm = reference.gated, reference.layer_norm, reference.rms_norm

_local = threading.local()


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias + residual`` in float32.

    Args:
        x: float32 (..., K).
        weight: float16 (N, K), any strides.
        bias: float32 (N,).
        residual: float32 (..., N), added after the sum over K.

    Returns:
        float32 (..., N).
    """
    n, k = weight.shape
    rows = x.reshape(-1, k)
    out = x.new_empty(rows.shape[0], n)
    step = max(1, TILE // max(k, 1))
    for start in range(0, n, step):
        tile = _upcast(weight[start : start + step])
        part = out[:, start : start + step]
        if bias is None:
            torch.mm(rows, tile.t(), out=part)
        else:
            torch.addmm(bias[start : start + step], rows, tile.t(), out=part)
    out = out.view(*x.shape[:-1], n)
    return out if residual is None else out.add_(residual)


def matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight + bias + residual`` in float32, for a weight of shape (K, N); else as `linear`."""
    return linear(x, weight.t(), bias, residual)


def embedding(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``weight`` (float16, (V, D)) at ``indices`` (integers, any shape) in float32."""
    return F.embedding(indices, weight).float()  # type: ignore[no-any-return]


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, transposed: bool = False
) -> torch.Tensor:
    """Return one product per expert, for rows sorted by expert; only experts with rows are read.

    Args:
        x: float32 (T, K).
        weight: float16 (E, N, K), or (E, K, N) when ``transposed``.
        counts: integers (E,), the rows of each expert; their sum is T.

    Returns:
        float32 (T, N).
    """
    product = matmul if transposed else linear
    rows = x.split(counts.tolist())
    parts = [product(part, weight[expert]) for expert, part in enumerate(rows) if len(part)]
    return torch.cat(parts) if parts else x.new_empty(0, weight.shape[2 if transposed else 1])


def survey(x: torch.Tensor, out: torch.Tensor | None = None, *, rounds: bool = False) -> reference.Survey:
    """As `reference.survey`, in steps along the first dimension: no copy of the whole is made."""
    if x.numel() <= CHUNK or not x.dim():
        return reference.survey(x, out, rounds=rounds)
    step = max(1, CHUNK * len(x) // x.numel())
    outs = [None] * -(-len(x) // step) if out is None else out.split(step)
    return reference.add([reference.survey(*each, rounds=rounds) for each in zip(x.split(step), outs, strict=True)])


def look(x: torch.Tensor, step: int, kept: torch.Tensor, row: int) -> reference.Survey:
    """Look at x, and write every step-th number of it (row-major order) to ``kept[row]``, as many as fit.

    kept: (R, N) float32.
    """
    numbers = _sampled(x, step, kept)
    kept[row, : len(numbers)] = numbers
    return survey(x)


def compare(x: torch.Tensor, step: int, kept: torch.Tensor, row: int, bound: float) -> tuple[int, float, float]:
    """Return how many of x are not finite, and how far its samples are from those that `look` kept.

    That is the sums of (a - b)^2 and b^2, in double, over samples a and kept ones b, where a is finite and
    \\|b\\| < bound.
    """
    got = _sampled(x, step, kept)
    want = kept[row, : len(got)]
    usable = got.isfinite() & (want.abs() < bound)
    got, want = got[usable].double(), want[usable].double()
    return survey(x).nonfinite, float((got - want).square().sum()), float(want.square().sum())


def _sampled(x: torch.Tensor, step: int, kept: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1)[::step][: kept.shape[1]].float()


def _upcast(part: torch.Tensor) -> torch.Tensor:
    """Return ``part`` (float16, 2-D) in float32, in this thread's scratch: valid until the next call."""
    scratch = _scratch(part.numel())
    if part.stride(0) == 1 and part.stride(1) != 1:  # column-major: copy along the contiguous dimension
        return scratch.view(part.shape[1], part.shape[0]).copy_(part.t()).t()
    return scratch.view(part.shape).copy_(part)


def _scratch(elements: int) -> torch.Tensor:
    scratch: torch.Tensor | None = getattr(_local, "scratch", None)
    if scratch is None or scratch.numel() < elements:
        # A tensor born in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            scratch = torch.empty(max(elements, TILE), dtype=torch.float32, device="cpu")
        _local.scratch = scratch
    return scratch[:elements]

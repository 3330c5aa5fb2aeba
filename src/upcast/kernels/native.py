"""The native kernels: tensors in, tensors out, over the limited-API module `_native`.

Activations are float32 and weights float16, all on the CPU; weights are read in place and upcast in registers. Nothing
here records gradients. Whatever a kernel cannot take is refused with a `KernelError` before any memory is touched.
"""

import functools
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from upcast.core.errors import KernelError, UpcastError
from upcast.kernels import native_library, portable
from upcast.kernels.block_spec import ACTIVATIONS, PARTS, BlockSpec, Matrix, Norm
from upcast.kernels.native_library import available, info, level, load_error, prefers_torch, set_isa
from upcast.kernels.reference import Survey

__all__ = [
    "add_up",
    "all_empty",
    "attention",
    "available",
    "block",
    "blocks",
    "can_call_blocks",
    "compare",
    "digest",
    "embedding",
    "gated",
    "grouped_linear",
    "info",
    "kv_append",
    "layer_norm",
    "level",
    "linear",
    "load_error",
    "look",
    "matmul",
    "meet",
    "prefers_torch",
    "quiet",
    "rms_norm",
    "rope",
    "set_isa",
    "survey",
    "unchanged",
]
_COPY_FIRST, _COPY_SECOND = 1, 2
Places = tuple[tuple[int, int, Tensor, Tensor, Tensor | None], ...]
WHOLE = PARTS["whole"]
_CPU = torch.device("cpu")
_empty = torch.empty
_float32 = torch.float32
_threads = torch.get_num_threads
Namespace = dict[str, Any]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


_native = native_library.native
_exchange = native_library.exchange


def _describe(tensor: Tensor | None) -> Any:
    """A tensor as the module takes it: itself, or a tuple where torch has no exchange interface.

    The tuple holds the tensor too: a temporary must live as long as its address is in use.
    """
    if tensor is None or _exchange:
        return tensor
    dtype = str(tensor.dtype).removeprefix("torch.")
    return tensor.data_ptr(), dtype, tensor.device.type, tuple(tensor.shape), tensor.stride(), tensor


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A copy in plain row-major order, whatever the strides were."""
    if tensor is None:
        return None
    return _empty(tensor.shape, dtype=tensor.dtype, device=_CPU).copy_(tensor)


def _product(out: Tensor, operands: tuple[Tensor | None, ...], transposed: bool) -> Tensor:
    """Fill out from (x, weight, bias, residual); what the module cannot walk is copied and tried again."""
    if _exchange:
        copies = _native.linear(out, *operands, transposed, _threads())
    else:
        copies = _native.linear(*map(_describe, (out, *operands)), transposed, _threads())
    if copies:
        x, weight, bias, residual = operands
        x = _rows(x) if copies & _COPY_FIRST else x
        residual = _rows(residual) if copies & _COPY_SECOND else residual
        _native.linear(*map(_describe, (out, x, weight, bias, residual)), transposed, _threads())
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias + residual, each product and sum in float32.

    x: (..., K) float32, any strides. weight: (N, K) float16, elements of a row adjacent. bias: (N,)
    float32, contiguous. residual: (..., N) float32, any strides, added after the sum over K.
    Returns (..., N) float32.
    """
    if native_library.torch_rows and prefers_torch(x.numel() // max(1, x.size(-1))):
        return portable.linear(x, weight, bias, residual)
    shape = [*x.shape] or [0]
    shape[-1] = weight.size(0)
    out = x.new_empty(*shape)  # sizes one by one are read in half the time, and this is called for every product
    if _exchange and not _native.linear(out, x, weight, bias, residual, False, _threads()):
        return out  # without a detour: this is most of what a model does
    return _product(out, (x, weight, bias, residual), False)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W + bias + residual: `linear` for a weight stored (K, N) float16, row-major.

    This is also the gradient of `linear` with respect to x, and GPT-2's Conv1D. Returns (..., N) float32.
    """
    if prefers_torch(x.numel() // max(1, x.size(-1))):
        return portable.matmul(x, weight, bias, residual)
    return _product(x.new_empty((*x.shape[:-1], weight.shape[-1])), (x, weight, bias, residual), True)


def embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight, upcast to float32.

    indices: int64 or int32, any shape. weight: (V, D) float16, elements of a row adjacent. Returns
    (*indices.shape, D) float32. IndexError where an index is out of range.
    """
    out = _empty((*indices.shape, weight.shape[-1]), dtype=_float32, device=_CPU)
    views = [_describe(tensor) for tensor in (out, indices.contiguous(), weight)]
    _native.embedding(*views, _threads())
    return out


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool = False) -> Tensor:
    """One linear per expert over rows sorted by expert; only experts with rows are read.

    x: (T, K) float32. weight: (E, N, K) float16, or (E, K, N) when transposed. counts: (E,) int64, the
    rows of each expert, adding up to T. Returns (T, N) float32.
    """
    if prefers_torch(x.shape[0] // max(1, len(counts))):
        return portable.grouped_linear(x, weight, counts, transposed)
    width = weight.shape[-1] if transposed else weight.shape[-2]
    out = _empty((x.shape[0], width), dtype=_float32, device=_CPU)
    views = [_describe(tensor) for tensor in (out, x, weight, counts)]
    if _native.grouped_linear(*views, transposed, _threads()):
        views[1] = _describe(_rows(x))
        _native.grouped_linear(*views, transposed, _threads())
    return out


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, offset: float, centred: bool) -> Tensor:
    out = _empty(*x.shape or (0,), dtype=_float32, device=_CPU)
    views = [_describe(tensor) for tensor in (out, x, weight, bias)]
    if _native.norm(*views, eps, offset, centred, _threads()):
        views[1] = _describe(_rows(x))
        _native.norm(*views, eps, offset, centred, _threads())
    return out


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension. x: (..., D) float32; weight, bias: (D,) float32 or None."""
    return _norm(x, weight, bias, eps=eps, offset=0.0, centred=True)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, unit_offset: bool = False) -> Tensor:
    """RMSNorm over the last dimension; with unit_offset the weight counts as 1 + weight (Gemma).

    x: (..., D) float32. weight: (D,) float32 or None.
    """
    return _norm(x, weight, None, eps=eps, offset=1.0 if unit_offset else 0.0, centred=False)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, both (..., D) float32; activation is "silu", "gelu" (exact) or "gelu_tanh"."""
    if activation not in ACTIVATIONS:
        raise UpcastError(f"activation is {activation!r}; the kernels have {', '.join(ACTIVATIONS)}. Use one of these.")
    kind = ACTIVATIONS[activation]
    out = _empty(gate.shape, dtype=_float32, device=_CPU)
    views = [_describe(tensor) for tensor in (out, gate, up)]
    if _native.gated(*views, kind, _threads()):
        views[1:] = [_describe(_rows(gate)), _describe(_rows(up))]
        _native.gated(*views, kind, _threads())
    return out


def _heads(x: Tensor) -> Tensor:
    """x itself, or a copy if the elements of its last dimension are not adjacent."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first cos.shape[-1] elements of every head; the others pass through.

    x: (B, H, T, D) float32, the last dimension adjacent. cos, sin: (T, n) or (B, T, n) float32, n even.
    Elements i and i + n/2 turn together; interleaved: elements 2i and 2i + 1.
    """
    out = _empty(*x.shape or (0,), dtype=_float32, device=_CPU)
    views = [_describe(tensor) for tensor in (out, _heads(x), cos, sin)]
    _native.rope(*views, interleaved, _threads())
    return out


def _named(kernel: Kernel) -> Kernel:
    """Have the profiler see a kernel that does what many operations do; all that it does not take is a KernelError."""
    name = f"upcast::{kernel.__name__}"

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            if not profiler._is_profiler_enabled:
                return kernel(*args, **kwargs)
            with profiler.record_function(name):
                return kernel(*args, **kwargs)
        except TypeError as error:  # an epsilon that is a string, say
            raise KernelError(f"{error}; upcast::{kernel.__name__} takes plain tensors and numbers.") from None

    return call  # type: ignore[return-value]  # the same signature


@_named
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
    """Attention of T new queries over a cache; scores, softmax and sums in float32.

    q: (B, Hq, T, D) float32; query t stands at position start + t. k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv),
    both float16 or both float32, valid up to position start + T - 1; Hq is a multiple of Hkv. scale:
    1/sqrt(D) unless given. window: positions seen, its own included. softcap: scores become
    softcap * tanh(score / softcap). Returns (B, Hq, T, Dv) float32, laid out as (B, T, Hq, Dv).
    """
    batch, heads, time, width = q.shape
    out = _empty(batch, time, heads, v.shape[-1], dtype=_float32, device=_CPU)
    factor = width**-0.5 if scale is None else scale
    views = [_describe(tensor) for tensor in (out, _heads(q), k, v)]
    _native.attention(*views, start, factor, causal, window or 0, softcap or 0.0, _threads())
    return out.transpose(1, 2)


def kv_append(cache: Tensor, new: Tensor, start: int, limit: float = 0.0) -> bool:
    """Write new (B, Hkv, T, D) float32 to positions start .. start + T - 1 of cache (B, Hkv, S, D).

    The cache is float16 or float32. False, and the cache unchanged, if a finite value would become
    infinite in float16, or if a position's root mean square over all heads is beyond ``limit`` (0: any may be).
    """
    written: bool = _native.kv_append(_describe(cache), _describe(_heads(new)), start, limit, _threads())
    return written


@_named
def block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    spec: BlockSpec,
    at: tuple[int, int] = (0, 0),
    part: int = WHOLE,
    last: int | None = None,
    first: Tensor | None = None,
) -> Tensor | None:
    """One transformer block in one call: norm, attention, residual, norm, MLP, residual.

    x: (B, T, C) float32, contiguous. cos, sin: ([B,] T, n) float32. keys, values: the cache (B, Hkv, S, D), both
    float16 or both float32, or None. at: the position of the first query, and where the cache takes it. part: one of
    PARTS. last: of how many last positions a whole block gives the output, while the cache gets all. first: (B,) int64,
    the first position that each row sees. Returns (B, last or T, C) float32, or None where `kv_append` would refuse
    the keys or the values; nothing but the cache was written then.
    """
    shape = x.shape if last is None else (x.shape[0], last, x.shape[2])
    out = _empty(*shape, dtype=_float32, device=_CPU)
    if _exchange:
        full = _native.block(out, x, cos, sin, keys, values, _threads(), part, *at, spec, first)
    else:
        views = [_describe(tensor) for tensor in (out, x, cos, sin, keys, values)]
        full = _native.block(*views, _threads(), part, *at, _described(spec), _describe(first))
    return None if full else out


def _described(spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a BlockSpec, or a part of one, with its tensors as the module takes them."""
    parts = [_described(each) if isinstance(each, tuple) else each for each in spec]
    return tuple([_describe(each) if isinstance(each, Tensor) else each for each in parts])


@_named
def blocks(
    x: Tensor,
    places: Places,
    blocks: tuple[Any, ...],
    last: int | None = None,
    finish: tuple[Norm, Matrix] | None = None,
) -> tuple[Tensor, int]:
    """Transformer blocks one after the other in one call, each as `block` has it.

    x: (B, T, C) float32, contiguous. places: (start, write, cos, sin, first or None) each. blocks: (index of its place,
    keys or None, values or None, BlockSpec) each. last: of how many last positions the last block gives the output.
    finish: a norm and a matrix (V, C) that follow; the output is then (B, last or T, V).
    Returns (output, number of blocks done). Fewer than there are, if `kv_append` would refuse keys or values of the
    next one; the output is then what that one takes.
    """
    odd, even = _empty(x.shape, dtype=_float32, device=_CPU), _empty(x.shape, dtype=_float32, device=_CPU)
    out = odd if len(blocks) % 2 else even  # what the one before does not write to
    if last is not None:
        out = _empty((x.shape[0], last, x.shape[2]), dtype=_float32, device=_CPU)
    end = None
    if finish is not None:
        logits = _empty((*out.shape[:2], finish[1].rows), dtype=_float32, device=_CPU)
        end = (*finish, logits)
    done = _native.blocks(out, x, odd, even, _threads(), places, blocks, end)
    if 0 < done == len(blocks):
        return out if finish is None else logits, done
    return (x if done == 0 else odd if done % 2 else even), done


def can_call_blocks() -> bool:
    """Whether `blocks` is there: torch hands its tensors to native code by itself from 2.10 on."""
    return _exchange


def survey(x: Tensor, out: Tensor | None = None, *, rounds: bool = False) -> Survey:
    """Look at x, float32 or float16, contiguous; write it, if float32, to out, a contiguous float16 of its shape.

    max_error is found with an out, and where ``rounds`` asks for it.
    """
    return Survey._make(_native.survey(_describe(x), rounds, _describe(out), _threads()))


def look(x: Tensor, step: int, kept: Tensor, row: int) -> Survey:
    """Look at x, float32 or float16, and write every step-th number of it (row-major order) to ``kept[row]``.

    kept: (R, N) float32, contiguous; at most N numbers are written.
    """
    found = _native.look(_describe(x), step, _describe(kept), row, _threads())
    return look(x.contiguous(), step, kept, row) if found is None else Survey._make(found)


def compare(x: Tensor, step: int, kept: Tensor, row: int, bound: float) -> tuple[int, float, float]:
    """Return how many of x are not finite, and sums of (a - b)^2 and b^2 over its samples a and kept ones b.

    x, step, kept, row: as for `look`. Counted are pairs where a is finite and \\|b\\| < bound; in double.
    """
    found: tuple[int, float, float] | None = _native.compare(
        _describe(x), step, _describe(kept), row, bound, _threads()
    )
    return compare(x.contiguous(), step, kept, row, bound) if found is None else found


def digest(tensors: list[Tensor]) -> int:
    """Return a checksum of 64 bits of the bytes of ``tensors``, float16 or float32 of any strides, in their order.

    Their shapes are no part of it, and neither is the number of threads.
    """
    rows = [each if each.dim() and each.stride(-1) == 1 else each.contiguous() for each in tensors]
    found: int = _native.digest([*map(_describe, rows)], _threads())
    return found


def _unchanged(kept: list[Any], dicts: list[Namespace], owners: list[Namespace], names: list[str]) -> bool:
    """Return whether ``kept`` holds the values of all ``dicts``, then ``owners[i].get(names[i])``: the same objects."""
    found = [*chain.from_iterable(map(dict.values, dicts)), *map(dict.get, owners, names)]
    return len(found) == len(kept) and all(map(is_, found, kept))


def _quiet(questions: list[Callable[[], object]], kept: list[Any], owners: list[Namespace], names: list[str]) -> bool:
    """Return whether no question answers with something true, and ``owners[i].get(names[i])`` is ``kept[i]``."""
    return not any(question() for question in questions) and _unchanged(kept, [], owners, names)


def _all_empty(dicts: list[Namespace]) -> bool:
    """Return whether nothing is in any of ``dicts``."""
    return not any(dicts)


# Asked for every product and token, with any kernels: natively, where there is a native library.
unchanged: Any = _unchanged if _native is None else _native.unchanged
quiet: Any = _quiet if _native is None else _native.quiet
all_empty: Any = _all_empty if _native is None else _native.all_empty


def meet(counters: Tensor, rank: int, turn: int, nanoseconds: int) -> int:
    """Say that ``rank`` has come to ``turn``, and wait until all ranks have, or for so long.

    counters: (ranks, 8) int64 in memory that the ranks share, zeros at first. Returns -1, or the first rank that was
    late. What a rank wrote before it called is seen by those that have met it.
    """
    late: int = _native.meet(_describe(counters), rank, turn, nanoseconds)
    return late


def add_up(x: Tensor, places: Tensor, counters: Tensor, rank: int, turn: int, nanoseconds: int) -> int:
    """As `meet`, with ``x`` (float32, contiguous) in ``places[rank]`` before, and every rank's sum in ``x`` after.

    places: (ranks, n) float32 in memory that the ranks share, n at least the numbers in x. If a rank was late x is as
    it was, and the call may be made again.
    """
    late: int = _native.add_up(_describe(x), _describe(places), _describe(counters), rank, turn, nanoseconds)
    return late

"""Kernels: float16 weights times float32 activations, and which implementation runs.

`native` is the compiled library; `portable` is plain PyTorch, runs everywhere, and says what native must give. Both
have the same functions. Here is what chooses between them; `gradients` differentiates through them. Where torch follows
what is done (`transforms`), the custom operators of `upcast.kernels.custom_ops` or torch's own operations stand in.
"""

import mmap
from types import ModuleType

import torch
from torch import Tensor

from upcast.core import config, memory_layout
from upcast.core.errors import UpcastError
from upcast.core.torch_modes import unfollowed
from upcast.kernels import gradients, native, packed, portable, reference, transforms, tuning
from upcast.kernels.packed_matrix import PackedExperts, PackedMatrix
from upcast.kernels.reference import Survey

_IMPLEMENTATIONS = {"native": native, "portable": portable}
LONG = 512  # rows of x
_LOOKED_AT = (torch.float16, torch.float32)  # by the native kernels
_active: ModuleType | None = None  # chosen on first use: importing upcast reads no environment


def use(choice: str) -> ModuleType:
    """Choose and return the implementation: ``auto`` (native where it loads), ``native`` or ``portable``.

    Raises:
        UpcastError: ``choice`` is none of these, or native kernels were asked for and cannot be loaded.
    """
    global _active  # noqa: PLW0603 - one choice per process, as UPCAST_KERNELS says
    if choice not in config.KERNELS:
        raise UpcastError(f"kernels {choice!r}; it must be one of {', '.join(config.KERNELS)}. Use 'auto'.")
    if choice == "native" and not native.available():
        raise UpcastError(
            f"native kernels were asked for, but they cannot be loaded ({native.load_error()}); upcast never replaces "
            "them in silence. Use UPCAST_KERNELS=auto, or install upcast where a C++ compiler is."
        )
    if choice == "auto":
        choice = "native" if native.available() else "portable"
    _active = _IMPLEMENTATIONS[choice]
    return _active


def active() -> ModuleType:
    """Return the implementation in use; on first use, the one that the environment asks for."""
    return _active or _as_the_environment_asks()


_questions = [torch.is_grad_enabled, *transforms.questions()]
_owners, _names, _kept = map(list, zip(*transforms.flags(), strict=True))
_dynamo, _quiet = transforms.dynamo, native.quiet


def direct() -> ModuleType | None:
    """Return the implementation in use, or None where autograd, a transformation or the profiler may want to see."""
    if _dynamo() or not _quiet(_questions, _kept, _owners, _names):
        return None
    return _active or _as_the_environment_asks()


def _as_the_environment_asks() -> ModuleType:
    settings = config.read()
    if settings.isa != "auto":
        native.set_isa(settings.isa)
    if native.available():
        tuning.load()
    return use(settings.kernels)


def name() -> str:
    """Return the name of the implementation in use."""
    return active().__name__.rpartition(".")[2]


def describe() -> str:
    """Return the implementation in use in words: which one, at which level, and why not native."""
    if active() is native:
        return f"native ({native.info()['isa']})"
    return f"portable ({native.load_error() or 'as asked'})"


Operand = Tensor | PackedMatrix
"""The numbers of a matrix: float16, or packed."""


def linear(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32: x float32 (..., K), weight (N, K) stored, bias float32 (N,).

    Differentiable with respect to x and bias; only the stored weight is kept for the backward pass.
    """
    way = transforms.way()
    if way != transforms.DIRECT:
        return _followed(way, x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = gradients.Linear.apply(x, weight, linear)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias
    return unfollowed_linear(x, weight, bias)


def _followed(way: str, x: Tensor, weight: Operand, bias: Tensor | None) -> Tensor:
    """Return `linear` by what torch can follow; only torch's own operations need the weight in float32."""
    if way == transforms.OPERATORS and isinstance(weight, PackedMatrix):
        return torch.ops.upcast.packed_linear(x, weight.blob, weight[1:], bias)  # type: ignore[no-any-return]
    if way == transforms.OPERATORS:
        return torch.ops.upcast.linear(x, weight, bias)  # type: ignore[no-any-return]
    if way == transforms.TORCH:
        return torch.nn.functional.linear(x, upcast(weight), bias)
    y: Tensor = gradients.NestedLinear.apply(x, gradients.opaque(weight), linear)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias


def unpack(matrix: PackedMatrix) -> Tensor:
    """Return the numbers of ``matrix`` in bfloat16, of its shape."""
    if transforms.way() == transforms.OPERATORS:
        return torch.ops.upcast.unpack(matrix.blob, matrix[1:])  # type: ignore[no-any-return]
    with unfollowed():  # what follows takes the numbers for a constant
        return packed.unpack(matrix)


def upcast(weight: Operand) -> Tensor:
    """Return the numbers of ``weight`` in float32."""
    return (unpack(weight) if isinstance(weight, PackedMatrix) else weight).float()


def unfollowed_linear(x: Tensor, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """Return `linear` without a look at who follows: below autograd and every transformation."""
    if isinstance(weight, PackedMatrix):
        return packed.linear(x, weight, bias)
    rows, columns = weight.stride()
    implementation = active()
    if weight.dtype != torch.float16:  # what was unpacked, because no kernel takes it as it lies
        result = portable.linear(x, weight, bias)
    elif columns == 1:
        result = implementation.linear(x, weight, bias)
    elif rows == 1:  # a transposed view, such as GPT-2's Conv1D and every backward pass make
        result = (portable if _suits_torch(x, weight) else implementation).matmul(x, weight.t(), bias)
    else:
        result = portable.linear(x, weight, bias)
    return result


def _suits_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's product with one upcast tile is faster: on AVX2, by a quarter from some hundred rows on."""
    small = weight.numel() <= portable.TILE and x.numel() >= LONG * x.shape[-1]
    return small and active() is native and native.level() == "x86-64-v3"


def embedding(indices: Tensor, weight: Operand) -> Tensor:
    """Return rows of ``weight`` (stored, (V, D)) at ``indices`` (integers, any shape) in float32."""
    way = transforms.way()
    if isinstance(weight, PackedMatrix):
        if way == transforms.DIRECT and not weight.transposed:
            return packed.embedding(indices, weight)
        if way == transforms.OPERATORS and not weight.transposed:
            return torch.ops.upcast.packed_embedding(indices, weight.blob, weight[1:])  # type: ignore[no-any-return]
        return portable.embedding(indices, unpack(weight))
    if way == transforms.OPERATORS:
        return torch.ops.upcast.embedding(indices, weight)  # type: ignore[no-any-return]
    if way != transforms.DIRECT:
        return portable.embedding(indices, weight)
    return unfollowed_embedding(indices, weight)


def unfollowed_embedding(indices: Tensor, weight: Tensor) -> Tensor:
    """Return `embedding` without a look at who follows."""
    implementation = portable if weight.stride(-1) != 1 or weight.dtype != torch.float16 else active()
    return implementation.embedding(indices, weight)  # type: ignore[no-any-return]


def grouped_linear(x: Tensor, weight: Tensor | PackedExperts, counts: Tensor) -> Tensor:
    """Return ``x[rows of e] @ weight[e]`` for every expert e, in float32; only experts with rows are read.

    x is float32 (T, K), its rows sorted by expert; weight stored (E, K, N), of any strides; counts integers (E,),
    with sum T. Differentiable with respect to x.
    """
    way = transforms.way()
    if way == transforms.OPERATORS:
        return torch.ops.upcast.grouped_linear(x, _unpacked(weight), counts)  # type: ignore[no-any-return]
    if way != transforms.DIRECT or (torch.is_grad_enabled() and x.requires_grad):
        return torch.cat([linear(part, _of(weight, e).t()) for e, part in enumerate(x.split(counts.tolist()))])
    return unfollowed_grouped_linear(x, weight, counts)


def _of(weight: Tensor | PackedExperts, expert: int) -> Operand:
    return weight.of(expert) if isinstance(weight, PackedExperts) else weight[expert]


def _unpacked(weight: Tensor | PackedExperts) -> Tensor:
    """Return the weights of all experts as torch.compile knows them: in bfloat16, for the time of the product."""
    if not isinstance(weight, PackedExperts):
        return weight
    whole = unpack(weight.matrix).view(weight.experts, -1, weight.matrix.columns)
    return whole.mT if weight.transposed else whole


def unfollowed_grouped_linear(x: Tensor, weight: Tensor | PackedExperts, counts: Tensor) -> Tensor:
    """Return `grouped_linear` without a look at who follows."""
    if isinstance(weight, PackedExperts):
        return packed.grouped_linear(x, weight.matrix, counts, weight.experts, transposed=not weight.transposed)
    if weight.dtype != torch.float16:
        result = portable.grouped_linear(x, weight, counts, transposed=True)
    elif weight.stride(-1) == 1:
        result = active().grouped_linear(x, weight, counts, transposed=True)
    elif weight.stride(-2) == 1:
        result = active().grouped_linear(x, weight.mT, counts)
    else:
        result = portable.grouped_linear(x, weight, counts, transposed=True)
    return result


def survey(x: Tensor, out: Tensor | None = None, *, rounds: bool = False) -> Survey:
    """Return what the numbers of ``x`` are and what float16 does to them, in one pass over memory.

    Args:
        x: floating-point, any shape and strides.
        out: float16 of the same shape; it gets the numbers, rounded to nearest.
        rounds: find the largest error of rounding also without an out.
    """
    x = memory_layout.plain(x.detach())
    rounds = rounds or out is not None
    if not x.is_contiguous():  # transposed, mostly: the order in which memory holds it is as good as any
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        x, out = x.permute(order), out if out is None else out.permute(order)
    whole = x.is_contiguous() and (out is None or out.is_contiguous())
    if whole and x.dtype in _LOOKED_AT and not (rounds and x.dtype == torch.float16):
        return active().survey(x, out, rounds=rounds)  # type: ignore[no-any-return]
    if whole and x.dtype == torch.bfloat16 and x.numel():
        return _survey_upcast(x.view(-1), None if out is None else out.view(-1), rounds)
    return portable.survey(x, out, rounds=rounds)


def _survey_upcast(x: Tensor, out: Tensor | None, rounds: bool) -> Survey:
    """Look at x (N,) in pieces of float32, which holds every bfloat16.

    They have memory of the system's own: the allocator of the C library takes what comes and goes in megabytes for a
    reason to keep it, and a load of a small model ends with 200 MB that nobody uses.
    """
    pieces = x.split(portable.CHUNK)
    outs = [None] * len(pieces) if out is None else out.split(portable.CHUNK)
    wide = torch.frombuffer(mmap.mmap(-1, 4 * pieces[0].numel()), dtype=torch.float32)
    implementation = active()
    return reference.add(
        [
            implementation.survey(wide[: len(piece)].copy_(piece), to, rounds=rounds)
            for piece, to in zip(pieces, outs, strict=True)
        ]
    )


def look(x: Tensor, step: int, kept: Tensor, row: int) -> Survey:
    """Return `survey` of ``x``, and write every step-th number of it, in row-major order, to ``kept[row]``.

    Args:
        x: floating-point, any shape and strides.
        step: from 1 on.
        kept: (R, N) float32, contiguous; at most N numbers are written.
    """
    implementation = active() if x.dtype in _LOOKED_AT else portable
    return implementation.look(x.detach() if x.requires_grad else x, step, kept, row)  # type: ignore[no-any-return]


def compare(x: Tensor, step: int, kept: Tensor, row: int, bound: float) -> tuple[int, float, float]:
    """Return how many of ``x`` are not finite, and how far its samples are from those that `look` kept.

    That is the sums of (a - b)^2 and b^2, in double, over samples a of x and b of ``kept[row]``, where a is finite and
    \\|b\\| < ``bound``.
    """
    implementation = active() if x.dtype in _LOOKED_AT else portable
    x = x.detach() if x.requires_grad else x
    return implementation.compare(x, step, kept, row, bound)  # type: ignore[no-any-return]


# --- for training: float32's own steps where no gradient is wanted, else a backward that keeps less -------------------


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done to one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, unit_offset: bool = False) -> Tensor:
    """Return RMSNorm of x (..., D) float32 over D; weight (D,) float32 counts as 1 + weight with ``unit_offset``.

    Differentiable with respect to x, for a weight that is frozen.
    """
    implementation = active()
    if wants_gradient(x):
        return gradients.RMSNorm.apply(implementation, x, weight, eps, unit_offset)  # type: ignore[no-any-return,no-untyped-call]
    return implementation.rms_norm(x, weight, eps, unit_offset)  # type: ignore[no-any-return]


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up, both (..., D) float32; "silu", "gelu" or "gelu_tanh". Differentiable in both."""
    implementation = active()
    if wants_gradient(gate, up):
        return gradients.Gated.apply(implementation, gate, up, activation)  # type: ignore[no-any-return,no-untyped-call]
    return implementation.gated(gate, up, activation)  # type: ignore[no-any-return]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first n elements of every head of x (B, H, T, D) float32 by cos and sin ([B,] T, n).

    Differentiable with respect to x.
    """
    implementation = active()
    if wants_gradient(x):
        return gradients.Rope.apply(implementation, x, cos, sin)  # type: ignore[no-any-return,no-untyped-call]
    return implementation.rope(x, cos, sin)  # type: ignore[no-any-return]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return attention of q (B, H, T, D) over the positions before each; k and v are (B, G, T, D), H a multiple of G.

    Differentiable in all three, once; in float32 or float64, by torch's own kernels.
    """
    return gradients.CausalAttention.apply(q, k, v, scale)  # type: ignore[no-any-return,no-untyped-call]

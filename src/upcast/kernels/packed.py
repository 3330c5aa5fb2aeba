"""Packed matrices times float32 activations: bfloat16 weights in 12 bits, exact; and which implementation runs.

What a packed matrix is stands in `packed_matrix`. Nothing here records gradients.
"""

from types import ModuleType

from torch import Tensor

from upcast import kernels
from upcast.kernels import native, packed_native, packed_portable
from upcast.kernels.packed_matrix import Born, PackedMatrix, size_of

__all__ = [
    "Born",
    "PackedMatrix",
    "check",
    "embedding",
    "examine",
    "grouped_linear",
    "linear",
    "pack",
    "size_of",
    "unpack",
]


def _active() -> ModuleType:
    return packed_native if kernels.active() is native else packed_portable


def examine(x: Tensor) -> Born:
    """Return whether ``x`` can be packed, and with what table.

    x: bfloat16, float16 or float32, any shape, contiguous. It can if every number equals itself rounded to bfloat16,
    bit for bit: NaNs keep their payload. A float16 counts as the float32 that it equals.
    """
    return _active().examine(x)  # type: ignore[no-any-return]


def pack(x: Tensor, born: Born | None = None, out: Tensor | None = None) -> PackedMatrix:
    """Return ``x``, whose numbers must all be bfloat16 ones, packed.

    Args:
        x: as `examine` takes it; all dimensions but the last make rows.
        born: what `examine` said of it, if it was asked.
        out: the blob to write to, uint8 of `size_of` bytes; one is made otherwise.

    Raises:
        UpcastError: some numbers have more digits, or ``born`` or ``out`` is not of these numbers.
    """
    return _active().pack(x, born, out)  # type: ignore[no-any-return]


def unpack(matrix: PackedMatrix, out: Tensor | None = None) -> Tensor:
    """Return the numbers of ``matrix``: bfloat16 (count, columns), of a transpose a transposed view.

    out: (count, columns), contiguous, bfloat16 or float32, to be written to and returned so.
    """
    return _active().unpack(matrix, out)  # type: ignore[no-any-return]


def check(matrix: PackedMatrix) -> None:
    """Look at a blob that comes from a file: its size, table and list of escapes.

    Raises:
        UpcastError: it is not what the numbers beside it say.
    """
    _active().check(matrix)


def linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return ``x @ matrix.T + bias + residual`` in float32.

    x: float32 (..., K). matrix: (N, K). bias: float32 (N,). residual: float32 (..., N), added after the sum over K.
    """
    return _active().linear(x, matrix, bias, residual)  # type: ignore[no-any-return]


def embedding(indices: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return the rows of ``matrix`` at ``indices`` (integers, any shape) in float32."""
    return _active().embedding(indices, matrix)  # type: ignore[no-any-return]


def grouped_linear(x: Tensor, matrix: PackedMatrix, counts: Tensor, experts: int, transposed: bool = False) -> Tensor:
    """Return one product per expert for rows of x sorted by expert, in float32; only experts with rows are read.

    x: float32 (T, K). matrix: ``experts`` parts of (N, K), one after the other, or of (K, N) when ``transposed``.
    counts: integers (E,), the rows of each expert, with sum T.
    """
    return _active().grouped_linear(x, matrix, counts, experts, transposed)  # type: ignore[no-any-return]

"""Packed matrices over the native kernels: `packed_portable` has the same functions and says what they give."""

from typing import Any

import torch
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.kernels import native_library, packed_portable
from upcast.kernels.native import _COPY_FIRST, _COPY_SECOND, _describe, _described, _rows, prefers_torch
from upcast.kernels.packed_matrix import Born, PackedMatrix, as_rows
from upcast.kernels.packed_portable import damaged, new_blob, not_exact, unfit

_native = native_library.native
_exchange = native_library.exchange
_CPU = torch.device("cpu")
_threads = torch.get_num_threads
_INEXACT, _UNFIT = 1, 2
_TABLE, _POINTERS, _OUTSIDE = 1, 2, 3


def _matrix(matrix: PackedMatrix) -> Any:
    return matrix if _exchange else _described(matrix)


def _source(x: Tensor) -> Any:
    return _describe(x.detach().contiguous())


def examine(x: Tensor) -> Born:
    """Return whether every number of ``x`` is a bfloat16, how many escape, and the table."""
    return Born._make(_native.packed_examine(_source(x), _threads()))


def pack(x: Tensor, born: Born | None = None, out: Tensor | None = None) -> PackedMatrix:
    """Pack ``x``, whose numbers must be bfloat16 ones, into ``out`` (uint8, of `size_of`) or into a blob of its own."""
    born = born or examine(x)
    rows, columns = as_rows(x.shape)
    blob = new_blob(born, rows, columns, out)
    failed = _native.packed_pack(_describe(blob), _source(x), born.table, born.escapes, _threads())
    if failed:
        raise not_exact() if failed == _INEXACT else unfit()
    return PackedMatrix(blob, rows, columns, born.escapes, 0, rows)


def unpack(matrix: PackedMatrix, out: Tensor | None = None) -> Tensor:
    """Return the numbers in use in bfloat16, or in ``out`` (count, columns); of a transpose a transposed view."""
    if out is None:
        out = torch.empty((matrix.count, matrix.columns), dtype=torch.bfloat16, device=_CPU)
    _native.packed_unpack(_describe(out), _matrix(matrix), _threads())
    return out.t() if matrix.transposed else out


def check(matrix: PackedMatrix) -> None:
    """Refuse a blob that is not what its numbers say."""
    damage, found = _native.packed_check(_matrix(matrix))
    if damage == _TABLE:
        raise damaged(f"{found} at the head of its table", "that entry is 0")
    if damage == _POINTERS:
        raise damaged("row pointers out of order", f"they ascend from 0 to the {matrix.escapes} escapes")
    if damage == _OUTSIDE:
        raise damaged(f"an escape in column {found} of {matrix.columns}", "escapes lie inside their row")
    if damage:
        raise damaged("columns of escapes out of order", "they ascend in a row")


def linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return ``x @ matrix.T + bias + residual`` in float32: x (..., K), bias (N,), residual (..., N)."""
    if native_library.torch_rows and prefers_torch(x.numel() // max(1, x.size(-1))):
        return packed_portable.linear(x, matrix, bias, residual)
    shape = [*x.shape] or [0]
    shape[-1] = matrix.columns if matrix.transposed else matrix.count
    out = x.new_empty(*shape)
    if _exchange and not _native.packed_linear(out, x, matrix, bias, residual, _threads()):
        return out
    copies = 0 if _exchange else _called(out, x, matrix, bias, residual)
    if _exchange or copies:
        _called(out, _rows(x), matrix, bias, _rows(residual))
    return out


def _called(out: Tensor, x: Tensor | None, matrix: PackedMatrix, bias: Tensor | None, residual: Tensor | None) -> int:
    described = [_describe(each) for each in (out, x)]
    copies: int = _native.packed_linear(*described, _matrix(matrix), _describe(bias), _describe(residual), _threads())
    return copies & (_COPY_FIRST | _COPY_SECOND)


def embedding(indices: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return the rows of ``matrix`` at ``indices`` (integers, any shape) in float32."""
    out = torch.empty((*indices.shape, matrix.columns), dtype=torch.float32, device=_CPU)
    _native.packed_embedding(_describe(out), _describe(indices.contiguous()), _matrix(matrix), _threads())
    return out


def grouped_linear(x: Tensor, matrix: PackedMatrix, counts: Tensor, experts: int, transposed: bool = False) -> Tensor:
    """Return one product per expert, whose rows of ``matrix`` follow one another; only experts with rows are read.

    x: (T, K) float32, sorted by expert. matrix: ``experts`` parts of (N, K), or of (K, N) when ``transposed``. counts:
    (E,) int64, adding up to T. Returns (T, N) float32.
    """
    if prefers_torch(x.shape[0] // max(1, experts)):
        return packed_portable.grouped_linear(x, matrix, counts, experts, transposed)
    if counts.shape != (experts,):
        raise UpcastError(f"counts are {tuple(counts.shape)} for {experts} experts; there is one for each. Check them.")
    width = matrix.columns if transposed else matrix.count // max(1, experts)
    out = torch.empty((x.shape[0], width), dtype=torch.float32, device=_CPU)
    views = [_describe(out), _describe(x), _matrix(matrix), _describe(counts)]
    if _native.packed_grouped(*views, transposed, _threads()):
        views[1] = _describe(_rows(x))
        _native.packed_grouped(*views, transposed, _threads())
    return out

"""Packed matrices in plain PyTorch: what the native kernels must agree with, and what runs without them.

Packing and unpacking agree bit for bit. Products unpack tiles of rows into float32, so that no copy of a large matrix
ever exists.
"""

import torch
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.kernels.packed_matrix import (
    CODES,
    RECORD,
    RECORD_BYTES,
    TABLE,
    Born,
    PackedMatrix,
    as_rows,
    layout,
    records_of,
    size_of,
)
from upcast.kernels.portable import CHUNK, TILE

_BYTES = 256
_LOW_BITS = 0xFFFF
# Weight 16v + 4l + i of a record is byte 16l + 8(v / 2) + 2i + v % 2 of it: unpacking leaves them in their own order.
_BYTE_OF = [16 * (n % 16 // 4) + 8 * (n // 32) + 2 * (n % 4) + n // 16 % 2 for n in range(RECORD)]
_WEIGHT_AT = sorted(range(RECORD), key=_BYTE_OF.__getitem__)


def examine(x: Tensor) -> Born:
    """Return whether every number of ``x`` is a bfloat16, how many escape, and the table."""
    counts = torch.zeros(_BYTES, dtype=torch.int64, device="cpu")
    exact = True
    for piece in x.detach().reshape(-1).split(CHUNK):
        bits, whole = _bits(piece)
        exact = exact and whole
        counts += torch.bincount(bits[bits != 0] >> 8, minlength=_BYTES)
    frequent = sorted((byte for byte in range(_BYTES) if counts[byte]), key=lambda byte: (-int(counts[byte]), byte))
    known = frequent[: TABLE - 1]
    escapes = int(counts.sum() - counts[known].sum())
    return Born(exact, escapes, bytes([0, *known]).ljust(TABLE, b"\0"))


def pack(x: Tensor, born: Born | None = None, out: Tensor | None = None) -> PackedMatrix:
    """Pack ``x``, whose numbers must be bfloat16 ones, into ``out`` (uint8, of `size_of`) or into a blob of its own."""
    rows, columns = as_rows(x.shape)
    born = born or examine(x)
    blob, lists = new_blob(born, rows, columns, out), []
    code_of = _codes(born.table)
    records = blob[: layout(rows, columns, 0).table].view(rows, records_of(columns) * RECORD_BYTES)
    step = max(1, CHUNK // max(1, columns))
    matrix = x.detach().reshape(rows, columns)
    for start in range(0, rows, step):
        bits, whole = _bits(matrix[start : start + step])
        if not whole:
            raise not_exact()
        codes = torch.where(bits == 0, 0, code_of[bits >> 8])
        away = ((codes == 0) & (bits != 0)).nonzero()
        lists.append((away[:, 0] + start, away[:, 1], bits[away[:, 0], away[:, 1]]))
        records[start : start + step] = _records(codes, torch.where(codes == 0, 0, bits & (_BYTES - 1)))
    _write_escapes(blob, born, rows, columns, lists)
    return PackedMatrix(blob, rows, columns, born.escapes, 0, rows)


def new_blob(born: Born, rows: int, columns: int, out: Tensor | None) -> Tensor:
    """Return the blob to pack into, ``out`` if it is one."""
    if not born.exact:
        raise not_exact()
    size = size_of(rows, columns, born.escapes)
    if out is None:
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    if out.dtype != torch.uint8 or out.dim() != 1 or out.numel() != size or not out.is_contiguous():
        raise UpcastError(
            f"a blob to pack into is {out.dtype} of shape {tuple(out.shape)}; {rows} rows of {columns} with "
            f"{born.escapes} escapes take {size} contiguous uint8. Allocate size_of(rows, columns, escapes) bytes."
        )
    return out


def not_exact() -> UpcastError:
    """Return the error for numbers that packing would change."""
    return UpcastError("numbers to pack have more digits than bfloat16; packing keeps every bit. Keep them in float16.")


def unfit() -> UpcastError:
    """Return the error for numbers that are not those of the `Born` beside them."""
    return UpcastError("numbers to pack are not those that were examined; their escapes differ. Examine them again.")


def unpack(matrix: PackedMatrix, out: Tensor | None = None) -> Tensor:
    """Return the numbers in use in bfloat16, or in ``out`` (count, columns); of a transpose a transposed view."""
    if out is None:
        out = torch.empty(matrix.count, matrix.columns, dtype=torch.bfloat16, device="cpu")
    step = max(1, CHUNK // max(1, matrix.columns))
    for start in range(0, matrix.count, step):
        rows = torch.arange(start, min(matrix.count, start + step), device="cpu") + matrix.begin
        out[start : start + step] = _unpack_rows(matrix, rows)
    return out.t() if matrix.transposed else out


def check(matrix: PackedMatrix) -> None:
    """Refuse a blob that is not what its numbers say."""
    blob, rows, columns, escapes = matrix[:4]
    if min(rows, columns, escapes) < 0 or blob.numel() != size_of(rows, columns, escapes):
        raise UpcastError(
            f"a packed matrix has {blob.numel()} bytes; {rows} rows of {columns} numbers with {escapes} escapes take "
            f"{size_of(rows, columns, escapes)}. Load the file again, or convert the model again."
        )
    if not 0 <= matrix.begin <= matrix.begin + matrix.count <= rows:
        raise damaged(f"rows {matrix.begin} to {matrix.begin + matrix.count} in use of {rows}", "rows in use exist")
    at = layout(rows, columns, escapes)
    if int(blob[at.table]):
        raise damaged(f"{int(blob[at.table])} at the head of its table", "that entry is 0")
    if not escapes:
        return
    pointers = _integers(blob, at.pointers, at.columns)
    if int(pointers[0]) or int(pointers[-1]) != escapes or bool((pointers.diff() < 0).any()):
        raise damaged("row pointers out of order", f"they ascend from 0 to the {escapes} escapes")
    places = _integers(blob, at.columns, at.values)
    if int(places.max()) >= columns:
        raise damaged(f"an escape in column {int(places.max())} of {columns}", "escapes lie inside their row")
    begins = torch.zeros(escapes + 1, dtype=torch.bool, device="cpu").index_fill_(0, pointers, True)
    if bool(((places.diff() <= 0) & ~begins[1:-1]).any()):
        raise damaged("columns of escapes out of order", "they ascend in a row")


def damaged(found: str, rule: str) -> UpcastError:
    """Return the error for a blob with parts that do not fit one another."""
    return UpcastError(f"a packed matrix has {found}; {rule}. Load the file again, or convert the model again.")


def linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Return ``x @ matrix.T + bias + residual`` in float32: x (..., K), bias (N,), residual (..., N)."""
    n = matrix.shape[0]
    rows = x.reshape(as_rows(x.shape))
    out = x.new_zeros(len(rows), n)
    step = max(1, TILE // max(matrix.columns, 1))
    for start in range(0, matrix.count, step):
        tile = unpack(matrix.narrow_rows(start, min(step, matrix.count - start))).float()
        if matrix.transposed:
            out.addmm_(rows[:, start : start + step], tile.t())
        else:
            torch.mm(rows, tile.t(), out=out[:, start : start + step])
    out = out.view(*x.shape[:-1], n)
    if bias is not None:
        out.add_(bias)
    return out if residual is None else out.add_(residual)


def embedding(indices: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return the rows of ``matrix`` at ``indices`` (integers, any shape) in float32."""
    flat = indices.reshape(-1).long()
    outside = (flat < 0) | (flat >= matrix.count)
    if bool(outside.any()):
        index = int(flat[outside][0])
        raise IndexError(f"index {index} is out of range for an embedding of {matrix.count} rows")
    return _unpack_rows(matrix, flat + matrix.begin).float().view(*indices.shape, matrix.columns)


def grouped_linear(x: Tensor, matrix: PackedMatrix, counts: Tensor, experts: int, transposed: bool = False) -> Tensor:
    """Return one product per expert, whose rows of ``matrix`` follow one another; only experts with rows are read.

    Args:
        x: float32 (T, K), sorted by expert.
        matrix: ``experts`` parts of (N, K), or of (K, N) when ``transposed``.
        counts: integers (E,), the rows of each expert; their sum is T.
        experts: E.
        transposed: the parts are used as they are, not transposed.

    Returns:
        float32 (T, N).
    """
    each = matrix.count // max(1, experts)
    parts = []
    for expert, part in enumerate(x.split(counts.tolist())):
        if len(part):
            weight = matrix.narrow_rows(expert * each, each)
            parts.append(linear(part, weight.t() if transposed else weight))
    return torch.cat(parts) if parts else x.new_empty(0, matrix.columns if transposed else each)


def _bits(x: Tensor) -> tuple[Tensor, bool]:
    """Return the 16 bits of every number as int32, and whether that is all there is to them."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).int() & _LOW_BITS, True
    wide = x.float().contiguous().view(torch.int32)
    return wide >> 16 & _LOW_BITS, not bool((wide & _LOW_BITS).any())


def _codes(table: bytes) -> Tensor:
    """Return the code of each high byte, 0 for those that the table does not have."""
    known = [table.find(byte, 1) for byte in range(_BYTES)]
    return torch.tensor([max(0, code) for code in known], dtype=torch.int32, device="cpu")


def _records(codes: Tensor, low: Tensor) -> Tensor:
    """Return rows of records of codes and low bytes (rows, columns)."""
    rows, columns = codes.shape
    padding = (0, records_of(columns) * RECORD - columns)
    codes, low = (
        torch.nn.functional.pad(each, padding).view(rows, records_of(columns), RECORD)[..., _WEIGHT_AT]
        for each in (codes, low)
    )
    joined = codes[..., :CODES] | codes[..., CODES:] << 4
    return torch.cat((joined, low), -1).to(torch.uint8).view(rows, records_of(columns) * RECORD_BYTES)


def _write_escapes(
    blob: Tensor, born: Born, rows: int, columns: int, lists: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Write the table and the numbers that it does not have: row, column and bits of each."""
    at = layout(rows, columns, born.escapes)
    blob[at.table : at.pointers] = torch.tensor(list(born.table), dtype=torch.uint8, device="cpu")
    if sum(len(where) for where, _, _ in lists) != born.escapes:
        raise unfit()
    if not born.escapes:
        return
    where, places, bits = map(torch.cat, zip(*lists, strict=True))
    pointers = torch.zeros(rows + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(torch.bincount(where, minlength=rows), 0, out=pointers[1:])
    blob[at.pointers : at.columns] = pointers.int().view(torch.uint8)
    blob[at.columns : at.values] = places.int().view(torch.uint8)
    blob[at.values :] = bits.to(torch.int16).view(torch.uint8)


def _integers(blob: Tensor, begin: int, end: int) -> Tensor:
    """Return uint32 of a blob as int64; copied first, as they may lie anywhere."""
    return blob[begin:end].clone().view(torch.int32).long() & 0xFFFFFFFF


def _unpack_rows(matrix: PackedMatrix, rows: Tensor) -> Tensor:
    """Return these rows of a blob (any, in any order) in bfloat16."""
    blob, columns = matrix.blob, matrix.columns
    at = layout(matrix.rows, columns, matrix.escapes)
    if not len(rows) or not columns:
        return torch.empty(len(rows), columns, dtype=torch.bfloat16, device="cpu")
    records = blob[: at.table].view(matrix.rows, -1, RECORD_BYTES)[rows]
    codes, low = records[..., :CODES], records[..., CODES:].int()
    both = torch.cat((codes & (TABLE - 1), codes >> 4), -1)
    high = blob[at.table : at.pointers].int()[both.long()]
    bits = (high << 8 | low)[..., _BYTE_OF].view(len(rows), -1)[:, :columns].to(torch.int16).contiguous()
    if matrix.escapes:
        _patch(bits, matrix, rows)
    return bits.view(torch.bfloat16)


def _patch(bits: Tensor, matrix: PackedMatrix, rows: Tensor) -> None:
    """Put the numbers that escaped where they belong."""
    at = layout(matrix.rows, matrix.columns, matrix.escapes)
    pointers = _integers(matrix.blob, at.pointers, at.columns)
    begins, counts = pointers[rows], pointers[rows + 1] - pointers[rows]
    into = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    index = torch.arange(len(into), device="cpu") - first[into] + begins[into]
    places = _integers(matrix.blob, at.columns, at.values)[index]
    bits[into, places] = matrix.blob[at.values : at.end].clone().view(torch.int16)[index]

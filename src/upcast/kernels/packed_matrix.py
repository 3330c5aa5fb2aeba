"""A packed matrix: bfloat16 numbers in 12 bits each, every bit kept, all of it in one blob of bytes.

A bfloat16 is a high byte (sign and upper seven bits of the exponent), of which a tensor has few different ones, and a
low byte. The blob holds, little endian: a record of 96 bytes for every 64 numbers of a row; a table of 16 high bytes;
and, where numbers escape the table, how many did before each row (rows + 1, uint32), their columns (uint32, ascending
in a row) and their bits (uint16). A record is 32 bytes of codes, two in each, and 64 low bytes. Code 0 with low byte 0
is +0.0, which is also what fills the last record of a row and stands in place of a number that escaped.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

RECORD = 64
"""Numbers in a record."""
RECORD_BYTES = 96
CODES = 32
"""Bytes of codes in a record: that of byte q in the low half of q % 32 for q < 32, else in the high half."""
TABLE = 16


class Layout(NamedTuple):
    """Where the parts of a blob begin, and its end."""

    table: int
    pointers: int
    columns: int
    values: int
    end: int


class PackedMatrix(NamedTuple):
    """Rows of a packed tensor, which is seen as a matrix.

    Attributes:
        blob: uint8 (bytes,), contiguous.
        rows, columns: of the whole blob.
        escapes: how many of its numbers are not in its table.
        begin, count: the rows in use.
        transposed: it stands for the transpose of those rows.
    """

    blob: Tensor
    rows: int
    columns: int
    escapes: int
    begin: int
    count: int  # type: ignore[assignment]  # tuple has a method of that name, which nobody asks here
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it stands for."""
        return (self.columns, self.count) if self.transposed else (self.count, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole blob."""
        return self.blob.numel()

    def t(self) -> "PackedMatrix":
        """Return the transpose, of the same bytes."""
        return self._replace(transposed=not self.transposed)

    def narrow_rows(self, begin: int, count: int) -> "PackedMatrix":
        """Return ``count`` of the stored rows in use, from ``begin`` on; of a transpose they are columns."""
        if not 0 <= begin <= begin + count <= self.count:
            raise IndexError(f"rows {begin} to {begin + count} of a packed matrix that has {self.count}")
        return self._replace(begin=self.begin + begin, count=count)


class PackedExperts(NamedTuple):
    """Matrices of one shape, one for each expert, as `upcast.kernels.grouped_linear` takes them: (E, K, N).

    Attributes:
        matrix: their rows, one expert after the other.
        experts: E.
        transposed: the rows of each are the columns of its matrix.
    """

    matrix: PackedMatrix
    experts: int
    transposed: bool

    def of(self, expert: int) -> PackedMatrix:
        """Return the matrix (K, N) of one expert."""
        each = self.matrix.count // self.experts
        found = self.matrix.narrow_rows(expert * each, each)
        return found.t() if self.transposed else found


class Born(NamedTuple):
    """What numbers are to the packing.

    Attributes:
        exact: each equals itself rounded to bfloat16, bit for bit; only then the rest says anything.
        escapes: those whose high byte is not in the table, +0.0 aside.
        table: 0, and the most frequent high bytes of all but +0.0: the most frequent first, of equals the smaller.
    """

    exact: bool
    escapes: int
    table: bytes


def records_of(columns: int) -> int:
    """Return how many records a row has."""
    return -(-columns // RECORD)


def layout(rows: int, columns: int, escapes: int) -> Layout:
    """Return where the parts of such a blob begin."""
    table = rows * records_of(columns) * RECORD_BYTES
    pointers = table + TABLE
    if not escapes:
        return Layout(table, pointers, pointers, pointers, pointers)
    listed = pointers + 4 * (rows + 1)
    values = listed + 4 * escapes
    return Layout(table, pointers, listed, values, values + 2 * escapes)


def size_of(rows: int, columns: int, escapes: int) -> int:
    """Return the bytes of a blob."""
    return layout(rows, columns, escapes).end


def as_rows(shape: Iterable[int]) -> tuple[int, int]:
    """Return the rows and columns as which a tensor of this shape is packed."""
    sizes = list(shape)
    columns = sizes.pop() if sizes else 1
    rows = 1
    for size in sizes:
        rows *= size
    return rows, columns

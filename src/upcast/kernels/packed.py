"""TEMPORARY twin."""
import math
from typing import Any, NamedTuple
import torch
from torch import Tensor

RECORD = 64


class PackedMatrix(NamedTuple):
    blob: Tensor
    rows: int
    columns: int
    escapes: int
    begin: int
    count: int
    transposed: bool = False

    @property
    def shape(self):
        return (self.columns, self.count) if self.transposed else (self.count, self.columns)

    @property
    def nbytes(self):
        return self.blob.nbytes

    def t(self):
        return self._replace(transposed=not self.transposed)

    def narrow_rows(self, begin, count):
        return self._replace(begin=self.begin + begin, count=count)


class PackedExperts(NamedTuple):
    matrix: PackedMatrix
    experts: int
    transposed: bool

    def unpacked(self, unpack: Any) -> Tensor:
        whole = unpack(self.matrix).view(self.experts, -1, self.matrix.columns)
        return whole.mT if self.transposed else whole

    def __getitem__(self, expert: Any):
        if not isinstance(expert, int):
            return tuple.__getitem__(self, expert)
        each = self.matrix.count // self.experts
        found = self.matrix.narrow_rows(expert * each, each)
        return found.t() if self.transposed else found


class Born(NamedTuple):
    exact: bool
    escapes: int
    table: bytes


def size_of(rows, columns, escapes):
    size = rows * -(-columns // 64) * 96 + 16
    return size + (4 * (rows + 1) + 6 * escapes if escapes else 0)


def examine(x):
    bits = x.float().contiguous().view(torch.int32)
    if (bits & 0xFFFF).any():
        return Born(False, 0, b"")
    b16 = (bits >> 16).view(-1) & 0xFFFF
    high = b16 >> 8
    counts = torch.bincount(high[b16 != 0], minlength=256)
    order = sorted(range(256), key=lambda h: (-int(counts[h]), h))[:15]
    table = bytes([0] + [h if counts[h] else 0 for h in order])
    return Born(True, int(counts.sum()) - sum(int(counts[h]) for h in order), table)


def pack(x, born=None, out=None):
    born = born or examine(x)
    b16 = x.to(torch.bfloat16).contiguous().view(torch.int16).view(-1, x.shape[-1]).clone()
    n, k = b16.shape
    return PackedMatrix(torch.cat([b16.view(torch.uint8).view(-1), torch.zeros(size_of(n, k, born.escapes), dtype=torch.uint8)])[: max(2 * n * k, size_of(n, k, born.escapes))].clone(), n, k, born.escapes, 0, n)


def unpack(m, out=None):
    whole = m.blob[: 2 * m.rows * m.columns].view(torch.bfloat16).view(m.rows, m.columns)
    part = whole[m.begin : m.begin + m.count].clone()
    return part.t() if m.transposed else part


def linear(x, m, bias=None, residual=None):
    y = torch.nn.functional.linear(x, unpack(m).float(), bias)
    return y if residual is None else y + residual


def embedding(i, m):
    return torch.nn.functional.embedding(i, unpack(m)).float()


def grouped_linear(x, m, counts, experts, transposed=False):
    w = unpack(m).float().view(experts, -1, m.columns)
    w = w if transposed else w.mT
    rows = x.split(counts.tolist())
    return torch.cat([r @ w[e] for e, r in enumerate(rows)])

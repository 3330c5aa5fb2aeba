"""What transformer blocks and experts are, for the kernels that run them in a single call.

The C++ side reads the fields by their order (csrc/python/bind_*.cpp); tests/kernels/test_block_spec.py holds both
against one another, so that they cannot drift apart.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from upcast.kernels.packed_matrix import PackedMatrix

PARTS = {"whole": 0, "attention": 1, "mlp": 2, "both": 3}
"""Which part of a block a call computes: any but the whole gives a branch alone, without residual and post norms."""
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
NORMS = {"none": 0, "rms": 1, "layer": 2}
STORAGES = {"float16": 0, "packed": 1}
"""How the numbers of a matrix are stored."""


class Matrix(NamedTuple):
    """A linear layer of a block.

    Attributes:
        weight: (rows, columns), rows contiguous; or a `PackedMatrix`; None where a block has no such layer.
        bias: (rows,) float32, or None.
        storage: one of STORAGES.
    """

    weight: Tensor | PackedMatrix | None = None
    bias: Tensor | None = None
    storage: int = STORAGES["float16"]

    @property
    def rows(self) -> int:
        """How many outputs it has."""
        return 0 if self.weight is None else self.weight.shape[0]


class ExpertSpec(NamedTuple):
    """One expert of a mixture: down(activation(gate(x)) * up(x)).

    Attributes:
        gate, up: (I, C); all experts of a mixture have the same I.
        down: (C, I).
    """

    gate: Matrix
    up: Matrix
    down: Matrix


class Norm(NamedTuple):
    """A norm of a block.

    Attributes:
        weight, bias: (width,) float32, or None.
        kind: one of NORMS.
        eps: added to the mean square or the variance.
        offset: added to the weight.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    kind: int = NORMS["none"]
    eps: float = 0.0
    offset: float = 0.0


class BlockSpec(NamedTuple):
    """One transformer block of width C: norm, attention, residual, norm, MLP, residual.

    Attributes:
        heads, groups, head_width: of queries, of keys and values, and the width D of both.
        norm_heads: ``norm_q`` and ``norm_k`` work on each head, not on all heads of a position at once.
        parallel: the MLP reads the block's input, not what attention gave.
        shared: and through ``norm_1``.
        activation: one of ACTIVATIONS.
        scale, softcap: of the scores; a softcap of 0 is none.
        window: how many positions a query sees, itself counted; 0: all before it.
        qkv, key, value: (H D + 2 Hkv D, C) in one matrix, or one for each, the query's as ``qkv``.
        proj, gate, up, down: the other linear layers; an MLP without gate has no ``up``. Where only
            attention is computed there may be no MLP.
        norm_1, norm_2, post_attention, post_mlp, norm_q, norm_k: the norms.
        key_limit, value_limit: the root mean square of a position beyond which a float16 cache refuses it; 0: none.
    """

    heads: int
    groups: int
    head_width: int
    norm_heads: bool
    parallel: bool
    shared: bool
    activation: int
    scale: float
    softcap: float
    window: int
    qkv: Matrix
    key: Matrix
    value: Matrix
    proj: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    norm_1: Norm
    norm_2: Norm
    post_attention: Norm
    post_mlp: Norm
    norm_q: Norm
    norm_k: Norm
    key_limit: float
    value_limit: float

    def items(self) -> Iterator[Any]:
        """Give all tensors and numbers that the block is made of."""
        yield from _flat(self)


def _flat(fields: tuple[Any, ...]) -> Iterator[Any]:
    for field in fields:
        yield from _flat(field) if isinstance(field, tuple) else (field,)

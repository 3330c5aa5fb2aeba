"""A small transformer block, and what the tests of the block kernel change in it."""

import torch
from torch import Tensor

from upcast.kernels.block_spec import ACTIVATIONS, NORMS, BlockSpec, Matrix, Norm

WIDTH, HEADS, HEAD, HIDDEN, TIME = 256, 4, 64, 512, 5
KINDS = {"sequential": (False, False), "parallel": (True, False), "shared": (True, True)}
UNEVEN = Norm(torch.linspace(0.5, 2.0, WIDTH), None, NORMS["rms"], 1e-5)


def example() -> tuple[Tensor, Tensor, Tensor, BlockSpec]:
    """Return x (1, TIME, WIDTH), cos and sin (TIME, HEAD), and a block of RMSNorms without biases."""
    generator = torch.Generator().manual_seed(0)

    def half(rows: int, columns: int) -> Matrix:
        return Matrix((torch.randn(rows, columns, generator=generator) * 0.05).half())

    angles = torch.randn(TIME, HEAD, generator=generator)
    norm = Norm(torch.ones(WIDTH), None, NORMS["rms"], 1e-5)
    spec = BlockSpec(
        heads=HEADS,
        groups=HEADS,
        head_width=HEAD,
        norm_heads=False,
        parallel=False,
        shared=False,
        activation=ACTIVATIONS["silu"],
        scale=HEAD**-0.5,
        softcap=0.0,
        window=0,
        qkv=half(3 * WIDTH, WIDTH),
        key=Matrix(),
        value=Matrix(),
        proj=half(WIDTH, WIDTH),
        gate=half(HIDDEN, WIDTH),
        up=half(HIDDEN, WIDTH),
        down=half(WIDTH, HIDDEN),
        norm_1=norm,
        norm_2=norm,
        post_attention=Norm(),
        post_mlp=Norm(),
        norm_q=Norm(),
        norm_k=Norm(),
        key_limit=0.0,
        value_limit=0.0,
    )
    return torch.randn(1, TIME, WIDTH, generator=generator), angles.cos(), angles.sin(), spec


def thirds(spec: BlockSpec) -> tuple[Matrix, Matrix, Matrix]:
    """Return query, key and value of the one matrix that has them."""
    weight, bias = spec.qkv.weight, spec.qkv.bias
    assert weight is not None
    biases = [None] * 3 if bias is None else bias.split(WIDTH)
    query, key, value = map(Matrix, weight.split(WIDTH), biases)
    return query, key, value


def with_matrices(spec: BlockSpec, query: Matrix, key: Matrix, value: Matrix) -> BlockSpec:
    return spec._replace(qkv=query, key=key, value=value)


def changed(kind: str = "sequential", split: bool = False) -> BlockSpec:
    """The block with biases, different norms and norms of the heads; `split`: query, key and value apart."""
    parallel, shared = KINDS[kind]
    spec = example()[-1]
    qkv = spec.qkv._replace(bias=torch.linspace(-1.0, 1.0, 3 * WIDTH))
    spec = spec._replace(parallel=parallel, shared=shared, norm_2=UNEVEN, norm_q=UNEVEN, norm_k=UNEVEN, qkv=qkv)
    return with_matrices(spec, *thirds(spec)) if split else spec


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x, cos, sin, _ = example()
    return torch.cat([x * (1 + i) for i in range(batch)]), cos, sin


def caches(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(batch, HEADS, 2 * TIME, HEAD, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def scaled(scale: float) -> Norm:
    """A norm of keys that makes them so large."""
    return Norm(torch.full((WIDTH,), scale), None, NORMS["rms"], 1e-5)

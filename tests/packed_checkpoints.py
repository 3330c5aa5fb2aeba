"""Checkpoint folders to pack: numbers of every kind, in every shape; no library is needed to make them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from upcast.integrations import convert_packed

LIT, PACKED = "lit_model.pth", "lit_model.safetensors"


def ordinary(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers as weights have them, in bfloat16."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.03).bfloat16()


def every_bfloat16() -> Tensor:
    """Return all 65,536 bfloat16 numbers: both zeros, subnormals, infinities, every NaN."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)


def with_escapes() -> Tensor:
    """Return a weight with numbers of every kind, few enough of the rare ones to be packed."""
    weight, rare = ordinary(64, 1030), every_bfloat16()[:: 1 << 6]  # rows that end in the middle of a record
    weight.view(-1)[:: weight.numel() // len(rare)][: len(rare)] = rare
    return weight


def state() -> dict[str, Tensor]:
    """Return a state dict of odd tensors."""
    embedding = ordinary(70, 128)
    random = torch.Generator().manual_seed(9)
    wide = ordinary(33, 200, seed=1).float()
    wide[0, :3] = torch.tensor([0x7F81, 0x7FC1, 0x8001]).to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    return {
        "head": embedding,
        "escapes": with_escapes(),
        "vector": torch.randn(7, generator=random),
        "tied": embedding.clone(),
        "wide": wide,
        "more digits": torch.randn(5, 130, generator=random),
        "half": ordinary(64, 128, seed=2).half(),
        "half with NaN": ordinary(64, 128, seed=2).half().index_fill(0, torch.tensor([3]), torch.nan),
        "kernel": ordinary(32, 64, 3, 3, seed=3),
        "deep": ordinary(2, 5, 100, seed=4),
        "one row": ordinary(1, 640, seed=5),
        "narrow": ordinary(40, 3),
        "turned": ordinary(128, 70, seed=6).t(),
        "nothing": torch.empty(0, 64, dtype=torch.bfloat16),
        "double": torch.randn(3, 3, dtype=torch.float64, generator=random),
        "mask": torch.tensor([True, False, True]),
        "count": torch.tensor(3),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }


def write(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Write a folder that looks as LitGPT's."""
    folder.mkdir(parents=True)
    torch.save(state() if tensors is None else tensors, folder / LIT)
    (folder / "model_config.yaml").write_text("name: small\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def packed(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """Return the packed file of such a folder."""
    convert_packed.pack(write(folder / "source", tensors), folder / "packed")
    return folder / "packed" / PACKED


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    bits: Callable[[Tensor], Tensor] = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))

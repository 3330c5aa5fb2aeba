"""torch's own layers, one row each: what any model may be made of."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.coverage_table.case import IDS, Case, Inputs, Missing, noise

GROUP = "torch.nn"


class Tensordot(nn.Module):
    """A projection written with tensordot and with the functional form of a bilinear product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 2100, 40) / 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(input, self.weight, dims=([1], [0]))


class Tied(nn.Module):
    """An embedding whose weight is the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4000, 320)
        self.head = nn.Linear(320, 4000)
        self.head.weight = self.embedding.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embedding(input))
        return logits


class Attention(nn.Module):
    """nn.MultiheadAttention with separate keys and values, as a decoder calls it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(1024, 8, batch_first=True, **settings)

    def forward(self, input: torch.Tensor) -> Any:
        memory = input[:, :3, : self.attention.kdim]
        return self.attention(input, memory, memory[..., : self.attention.vdim])


# Sizes at which a float32 copy of a weight is larger than 4 MB, so that the row tells.
ROWS: list[tuple[str, Callable[[], nn.Module], Any]] = [
    ("Linear", lambda: nn.Linear(1025, 1100), (3, 1025)),
    ("Bilinear", lambda: nn.Bilinear(110, 110, 110), None),
    ("Embedding", lambda: nn.Embedding(5000, 320, padding_idx=0), IDS),
    ("Embedding with max_norm", lambda: nn.Embedding(500, 320, max_norm=1.0), IDS),
    ("EmbeddingBag", lambda: nn.EmbeddingBag(5000, 320), IDS),
    ("EmbeddingBag, max", lambda: nn.EmbeddingBag(5000, 320, mode="max"), IDS),
    ("tied Embedding and Linear", Tied, IDS),
    ("Conv1d", lambda: nn.Conv1d(512, 700, 3), (2, 512, 9)),
    ("Conv2d", lambda: nn.Conv2d(256, 500, 3), (2, 256, 9, 9)),
    ("Conv3d", lambda: nn.Conv3d(128, 400, 3), (2, 128, 4, 5, 5)),
    ("Conv1d, grouped", lambda: nn.Conv1d(768, 768, 128, groups=16), (1, 768, 130)),
    ("Conv2d, depthwise", lambda: nn.Conv2d(640, 640, 7, groups=640), (1, 640, 9, 9)),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(700, 512, 4, stride=2), (1, 700, 5)),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(500, 256, 3), (1, 500, 5, 5)),
    ("ConvTranspose1d, grouped", lambda: nn.ConvTranspose1d(1024, 1024, 16, stride=8, groups=8), (1, 1024, 5)),
    ("LSTM", lambda: nn.LSTM(320, 640, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 320)),
    ("LSTM with a projection", lambda: nn.LSTM(320, 640, proj_size=320), (5, 2, 320)),
    ("GRU", lambda: nn.GRU(320, 640, num_layers=2), (5, 2, 320)),
    ("RNN", lambda: nn.RNN(1024, 1100, nonlinearity="relu"), (5, 2, 1024)),
    ("LSTMCell", lambda: nn.LSTMCell(1024, 320), (2, 1024)),
    ("GRUCell", lambda: nn.GRUCell(1024, 360), (2, 1024)),
    ("MultiheadAttention", Attention, (2, 5, 1024)),
    ("MultiheadAttention, kdim and vdim", lambda: Attention(kdim=1000, vdim=900), (2, 5, 1024)),
    ("TransformerEncoder", lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2), (2, 5, 1024)),
    ("Transformer", lambda: nn.Transformer(1024, 8, 1, 1, 2048, batch_first=True), "both"),
    ("weight_norm", lambda: parametrizations.weight_norm(nn.Conv1d(768, 768, 128, groups=16), dim=2), (1, 768, 130)),
    ("weight_norm on Linear", lambda: parametrizations.weight_norm(nn.Linear(1025, 1100)), (3, 1025)),
    ("tensordot", Tensordot, (3, 32)),
    ("PReLU and GroupNorm", lambda: nn.Sequential(nn.Conv1d(8, 8, 1), nn.GroupNorm(2, 8), nn.PReLU(8)), (2, 8, 5)),
]


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each layer."""
    for name, build, shape in ROWS:
        yield Case(GROUP, name, build, _inputs(name, shape), fast=True)


def _layer(kind: Any) -> nn.Module:
    layer: nn.Module = kind(1024, 8, 2048, batch_first=True)
    return layer


def _inputs(name: str, shape: Any) -> Callable[[nn.Module], Inputs]:
    if shape is None:
        return lambda _: {"input1": noise(3, 110), "input2": noise(3, 110)}
    if shape == "both":
        return lambda _: {"src": noise(2, 5, 1024), "tgt": noise(2, 3, 1024)}
    key = "src" if name == "TransformerEncoder" else "input"
    return lambda _: {key: shape if isinstance(shape, torch.Tensor) else noise(*shape)}

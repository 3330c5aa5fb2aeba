"""A small model with one of each kind of tensor, and all that a patch could leave behind in a model."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Embedding, convolution, norms, a tied head, a buffer: one of each kind of tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(129, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 65)
        self.down = nn.Linear(65, 32, bias=False)
        self.head = nn.Linear(32, 129, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 1.5))
        self.eval()  # in training mode a model of which all requires grad is refused

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x * self.scale)


IDS = torch.arange(14).view(2, 7) * 9


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that a patch could leave behind: attributes, hooks, classes, tensors by identity."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[name] = (
            type(module),
            {key: dict(v) if isinstance(v, (dict, OrderedDict)) else v for key, v in module.__dict__.items()},
        )
    return found

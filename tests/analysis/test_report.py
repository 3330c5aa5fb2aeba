"""What was done to a model, as text and as a picture of its memory layer by layer."""

from pathlib import Path

import pytest
import torch
from torch import nn

import upcast
from upcast.patching import engine


class Net(nn.Module):
    """A table, three numbered blocks and a head that is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)])
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight


def patched() -> nn.Module:
    torch.manual_seed(0)
    return upcast.patch(Net(), keep=["blocks.1.0.weight"])


def test_it_is_the_text_of_before() -> None:
    model = patched()
    found = upcast.report(model)
    assert found == engine.report(model)
    assert "policy: safe" in found


def test_the_layers_add_up_to_the_plan() -> None:
    found = upcast.report(patched())
    layers = {layer.name: layer for layer in found.layers()}
    assert [*layers] == ["embed", "blocks.0", "blocks.1", "blocks.2"]  # the head is the embedding
    assert layers["embed"] == ("embed", 4 * 32 * 8, 2 * 32 * 8, 0)
    assert layers["blocks.0"] == ("blocks.0", 4 * (64 + 24), 2 * 64, 4 * 24)
    assert layers["blocks.1"] == ("blocks.1", 4 * (64 + 24), 0, 4 * (64 + 24))
    plan = engine.record_of(patched()).plan
    assert sum(layer.before for layer in layers.values()) == plan.bytes_before
    assert sum(layer.float16 + layer.rest for layer in layers.values()) == plan.bytes_after


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = upcast.report(patched()).plot(tmp_path / "memory.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_piece_has_no_picture(tmp_path: Path) -> None:
    with pytest.raises(upcast.UpcastError, match="Report the whole model"):
        upcast.report(patched().blocks).plot(tmp_path / "memory.png")


def test_parts_are_drawn_together() -> None:
    both = nn.ModuleDict({"a": patched(), "b": patched()})
    found = upcast.report(both)
    assert found.startswith("a: ")
    assert sum(layer.before for layer in found.layers()) == 2 * engine.record_of(patched()).plan.bytes_before

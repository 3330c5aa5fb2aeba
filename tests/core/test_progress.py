"""How far long work has come: on a terminal, after two seconds, with the time left; nothing into a file or a pipe."""

import io
import re
import sys
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from upcast.core import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Causal(nn.Module):
    """Logits for token ids, of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.head = nn.Linear(16, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.arange(40)[None] % 64
WORK: dict[str, Any] = {
    "diagnose": lambda model: upcast.diagnose(model, IDS),
    "ablate": lambda model: upcast.ablate(model, [IDS, IDS + 1]),
    "search": lambda model: upcast.search(model, IDS, verbose=False),
    "certify": lambda model: upcast.certify(model, IDS[0], window=16, greedy=1),
}


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("terminal", [True, False])
def test_measuring_shows_how_far_it_is(work: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_PATIENCE", 0)
    bars: list[console.Progress] = []

    def close(bar: console.Progress) -> None:
        bars.append(bar)

    monkeypatch.setattr(console.Progress, "close", close)
    torch.manual_seed(0)
    WORK[work](Causal().eval())
    assert ("0%" in stream.getvalue()) == terminal
    (bar,) = bars
    if terminal:
        assert (0.1 if work == "search" else 0.5) < bar.done / bar.total <= 1  # a search may soon be over
    assert not nn.modules.module._global_forward_hooks


def test_what_is_soon_done_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    WORK["diagnose"](Causal().eval())
    assert "%" not in stream.getvalue()


@pytest.mark.parametrize("patience", [0, 60])
def test_without_tqdm_a_line_per_tenth_says_how_long_it_will_take(
    patience: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_PATIENCE", patience)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with console.Progress(100, "work") as progress:
        for _ in range(100):
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == (10 if patience == 0 else 0)
    assert all(re.fullmatch(r"upcast: work: \d+0 % done, \d+ s left", line) for line in lines)


def test_a_silent_upcast_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_PATIENCE", 0)
    monkeypatch.setenv("UPCAST_VERBOSE", "0")
    WORK["diagnose"](Causal().eval())
    assert stream.getvalue() == ""

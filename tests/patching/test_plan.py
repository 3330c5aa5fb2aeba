"""plan and report: what patch would do, what it did, and the lines that say so."""

import pytest
import torch
from torch import nn

import upcast
from tests.models import Net, snapshot
from upcast.patching.plan import CONVERT, KEEP, SHARE, UPCAST, WRAP

pytestmark = pytest.mark.usefixtures("each_kernels")


def test_plan_is_pure_and_patch_does_what_it_says() -> None:
    model = Net()
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    with torch.no_grad():
        model.up.weight[0, 0] = 1e-9
        model.down.weight[0, 0] = 1e5
    before = snapshot(model)
    plan = upcast.plan(model, keep=["conv"])
    assert snapshot(model) == before
    upcast.patch(model, keep=["conv"])
    assert upcast.patching.engine.record_of(model).plan == plan
    actions = {change.name: change.action for change in plan.changes}
    assert actions["embed.weight"] == CONVERT
    assert actions["head.weight"] == SHARE
    assert actions["conv.weight"] == actions["down.weight"] == actions["norm.weight"] == KEEP
    (up,) = (change for change in plan.changes if change.name == "up.weight")
    assert up.rounding.flushed == 1
    assert 0 < up.rounding.max_error < 1e-3
    assert plan.bytes_after == sum(p.nbytes for p in model.parameters()) - model.head.weight.nbytes


def test_plan_of_a_float16_model_is_lossless() -> None:
    plan = upcast.plan(Net().half())
    assert {change.action for change in plan.changes} == {WRAP, UPCAST}
    assert all(change.rounding.lossless for change in plan.changes)


def test_plan_prints_a_row_per_tensor_and_the_total() -> None:
    plan = upcast.plan(Net())
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(plan.changes) + 2
    assert lines[0].split()[:4] == ["tensor", "shape", "dtype", "action"]
    assert lines[-2].startswith("Net: ")
    assert lines[-1].startswith("inference: all of the weights require grad")


def test_patch_says_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    upcast.patch(Net())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("upcast: Net 0.0 MB -> 0.0 MB, ")
    assert line.endswith("kernels; tensors in float32: 4 (a vector)")
    monkeypatch.setenv("UPCAST_VERBOSE", "0")
    upcast.patch(Net())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("UPCAST_VERBOSE", "2")
    upcast.patch(Net())
    assert "embed.weight" in capsys.readouterr().err


def test_unpatch_says_what_rounding_lost(capsys: pytest.CaptureFixture[str]) -> None:
    upcast.unpatch(upcast.patch(Net()))
    assert "rounding to float16 changed 4 tensors, by up to" in capsys.readouterr().err
    upcast.unpatch(upcast.patch(Net().half()))
    assert "nothing was lost" in capsys.readouterr().err


def test_the_report_counts_float32_copies() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shares = nn.Parameter(torch.randn(132, 33))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.shares.softmax(-1).t()

    model = upcast.patch(Mixture())
    assert "upcast whole: none" in upcast.report(model)
    for _ in range(2):
        model(torch.randn(5, 33))
    text = upcast.report(model)
    assert "upcast whole: softmax: 2 calls, up to 17,424 bytes" in text
    assert "shares" in text
    with pytest.raises(upcast.UpcastError, match="is not patched"):
        upcast.report(nn.Linear(3, 3))

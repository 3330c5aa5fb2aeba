"""The training suite's record and picture, from courses that nobody has to train for."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("litgpt")
pytest.importorskip("matplotlib")

from benchmarks import run
from benchmarks.harness.training import Course, Job, summary
from benchmarks.suites import training as training_suite


def course(peak: int, losses: list[float]) -> Course:
    return Course(peak // 4, peak // 2, peak, [peak] * len(losses), [1.0] * len(losses), losses)


COST = {"litgpt": {"float32": course(2_900_000_000, [3.0, 2.0]), "upcast": course(2_000_000_000, [3.0, 2.0])}}
CURVES = {
    "float32": course(400, [3.0, 2.5, 2.0, 1.5]),
    "upcast": course(400, [3.0, 2.5, 2.0, 1.5001]),
    "float16 x4096": course(400, [math.nan]),
}


def test_record_and_picture(tmp_path: Path) -> None:
    content = json.loads(json.dumps(training_suite.record(COST, CURVES, 2)))
    assert content["losses"]["upcast"] == CURVES["upcast"].losses
    assert content["cost"]["litgpt"]["float32"]["peak_bytes"] == 2_900_000_000
    assert training_suite.draw(content, tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_says_what_was_saved_and_how_far_apart_losses_are() -> None:
    lines = summary({**COST["litgpt"]}).splitlines()
    assert "saved 900.0 MB (124% of float32's weights)" in lines[1]
    assert "losses at most 1.0e-04 apart" in summary(CURVES).splitlines()[1]


def test_names_tell_the_stress_test_s_scales_apart() -> None:
    assert [Job("upcast").name, Job("upcast", scale=64).name] == ["upcast", "upcast x64"]


def test_the_suite_is_reachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(training_suite, "main", lambda *arguments: asked.append(arguments) or 0)
    assert run.main(["--suite", "training", "--quick", "--output", str(tmp_path), "--threads", "1"]) == 0
    assert asked == [(tmp_path, True, 1)]

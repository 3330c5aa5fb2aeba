"""The picture of decode beside its bound: what a token reads, over the rate of the same rounds."""

from pathlib import Path

import pytest

import upcast
from benchmarks.harness import record, roofline
from benchmarks.harness.session import QUICK
from benchmarks.harness.variants import bytes_per_token, weight_bytes
from tests.benchmarks.test_benchmarks import RESULTS, SUBJECT, tiny


def test_roofline_divides_the_bytes_that_a_token_reads_by_the_rate_of_the_rounds(tmp_path: Path) -> None:
    content = record.record(SUBJECT, QUICK, RESULTS, None, 1.0, [9e9, 30e9, 10e9])
    bars = [(name, 60.0, pytest.approx(53.8)) for name in ("float32", "float16", "upcast")]  # not what has failed
    assert roofline.bars(content) == bars
    assert "at 10.0 GB/s takes of them: float32 60.0 of at least 53.8; float16" in roofline.in_words(content)
    drawn = roofline.draw(content, roofline.beside(tmp_path / "tiny.json"))
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert roofline.draw(content | {"read_rates": []}, tmp_path / "no.png") is None


def test_bytes_per_token_leave_out_an_embedding_that_is_only_looked_up() -> None:
    model = tiny()
    assert bytes_per_token(model) == weight_bytes(model) - 4 * 64 * 32
    model.lm_head.weight = model.transformer.wte.weight
    assert bytes_per_token(model) == weight_bytes(model)
    assert bytes_per_token(upcast.patch(model)) == weight_bytes(model)
    experts = {"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 1}
    assert bytes_per_token(tiny(**experts)) is None

"""The picture of decode beside its bound: what a token reads, over the rate of the same rounds."""

from pathlib import Path

import pytest
import torch

import upcast
from benchmarks.harness import limits, record, roofline
from benchmarks.harness.session import QUICK, Rates
from benchmarks.harness.variants import bytes_per_token, prompt_operations, weight_bytes
from tests.benchmarks.test_benchmarks import RESULTS, SUBJECT, tiny
from upcast.core.errors import KernelError
from upcast.kernels import limits as kernel_limits
from upcast.kernels import native


def test_roofline_divides_the_bytes_that_a_token_reads_by_the_rate_of_the_rounds(tmp_path: Path) -> None:
    content = record.record(SUBJECT, QUICK, RESULTS, None, 1.0, Rates([9e9, 30e9, 10e9], []))
    bars = [(name, 60.0, pytest.approx(53.8)) for name in ("float32", "float16", "upcast")]  # not what has failed
    assert roofline.bars(content) == bars
    assert "at 10.0 GB/s takes of them: float32 60.0 of at least 53.8; float16" in roofline.in_words(content)
    drawn = roofline.draw(content, roofline.beside(tmp_path / "tiny.json"))
    assert drawn is not None
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert roofline.draw(content | {"read_rates": []}, tmp_path / "no.png") is None


def test_prefill_is_a_share_of_the_multiply_adds_that_the_processor_did() -> None:
    content = record.record(SUBJECT, QUICK, RESULTS, None, 1.0, Rates([10e9], [100e9, 300e9, 200e9]))
    assert roofline.prefill_shares(content) == {}  # nobody has said what a prefill is
    taken = content["variants"][0]["timings"]["prefill_seconds"]["median"]
    content["variants"][0]["prompt_operations"] = int(50e9 * taken)
    assert roofline.prefill_shares(content)["float32"] == pytest.approx(0.25)
    assert "Of 200 GFLOP/s in registers prefill's products use: float32 25 %" in roofline.in_words(content)


def test_prompt_operations_count_the_head_once() -> None:
    model = tiny()
    matrices = sum(
        each.numel() for name, each in model.named_parameters() if "transformer.h" in name and each.dim() == 2
    )
    assert prompt_operations(model, 10) == 2 * (10 * matrices + model.lm_head.weight.numel())


@pytest.mark.skipif(not native.available(), reason="native kernels")
def test_the_limits_of_this_machine() -> None:
    rate = limits.multiply_rate()
    assert rate is not None
    assert rate > 1e9
    assert kernel_limits.multiply_adds(10) % (10 * torch.get_num_threads()) == 0
    for numbers in (torch.ones(0), torch.ones(7), torch.ones(10_001)):
        kernel_limits.read_memory(numbers, 3)
    with pytest.raises(KernelError):
        kernel_limits.read_memory(torch.ones(4, 4).t(), 1)
    waits = limits.region_seconds()
    assert waits.keys() <= {"team", "pool"}
    assert all(0 < seconds < 1e-2 for seconds in waits.values())
    kernel_limits.regions(1, together=True)


def test_bytes_per_token_leave_out_an_embedding_that_is_only_looked_up() -> None:
    model = tiny()
    assert bytes_per_token(model) == weight_bytes(model) - 4 * 64 * 32
    model.lm_head.weight = model.transformer.wte.weight
    assert bytes_per_token(model) == weight_bytes(model)
    assert bytes_per_token(upcast.patch(model)) == weight_bytes(model)


def test_a_token_reads_the_experts_that_it_chooses() -> None:
    model = tiny(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2)
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    chosen = [weight for name, weight in model.named_parameters() if ".experts.1." in name or ".experts.5." in name]
    idle = sum(weight.nbytes for weight in experts) - sum(weight.nbytes for weight in chosen)
    assert idle == 3 * sum(weight.nbytes for weight in chosen)
    assert bytes_per_token(model) == weight_bytes(model) - model.transformer.wte.weight.nbytes - idle
    others = [each for each in model.transformer.h.parameters() if each.dim() == 2]
    used = sum(weight.numel() for weight in others) - idle // 4
    assert prompt_operations(model, 5) == 2 * (5 * used + model.lm_head.weight.numel())

"""Fine-tuning SmolLM2-135M itself: gradients of its adapters, losses under the exact stress test, flat memory."""

import math
from typing import Any

import pytest
import torch

from benchmarks.harness.training import Job, Trainer, measure
from tests.conftest import half_weights, relative_error

pytest.importorskip("litgpt")
pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.usefixtures("smollm2")]

SMALL: dict[str, Any] = {"batch": 2, "sequence": 64, "threads": torch.get_num_threads()}
LAYERS = 30
SHALLOW, DEEP = 1e-5, 5e-5  # of a tensor: in the last third of the blocks, and below
FLAT = 20_000_000  # bytes


def learned(trainer: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Return by name what the next step gives each adapter."""
    kept: dict[str, torch.Tensor] = {}

    def step() -> None:
        kept.update({name: p.grad.clone() for name, p in learned(trainer).items() if p.grad is not None})

    trainer.optimizer.step = step
    trainer.step()
    return kept


@pytest.mark.parametrize("library", ["litgpt", "transformers"])
def test_gradients_of_adapters_are_float32_s(library: str) -> None:
    wanted, trainer = (Trainer(Job(variant, library, **SMALL)) for variant in ("float32", "upcast"))
    assert half_weights(trainer.model)
    assert not half_weights(wanted.model)
    for _ in range(2):  # at their start half of the gradients are 0
        wanted.step()
    trainer.steps = wanted.steps
    with torch.no_grad():
        for name, parameter in learned(trainer).items():
            parameter.copy_(learned(wanted)[name])
    want, got = gradients(wanted), gradients(trainer)
    assert got.keys() == want.keys()
    assert len(got) == LAYERS * (2 if library == "litgpt" else 4)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{library}: worst {errors[worst]:.1e} ({worst})")
    for name, error in errors.items():
        block = int(next(part for part in name.split(".") if part.isdigit()))
        assert error <= (SHALLOW if block >= 2 * LAYERS // 3 else DEEP), name


@pytest.mark.parametrize("scale", [4, 64, 1024, 4096])
def test_the_stress_test_changes_no_loss_and_breaks_plain_float16(scale: int) -> None:
    """Powers of two cancel in every norm, forwards and backwards: not a bit of a loss may change."""
    jobs = [Job("upcast", **SMALL), *(Job(name, scale=scale, **SMALL) for name in ("upcast", "float16"))]
    courses = measure(jobs, 3)
    want, got, plain = (course.losses for course in courses.values())
    assert got == want
    assert len(set(want)) == 3
    assert math.isnan(plain[0])


def test_many_steps_leave_memory_flat() -> None:
    job = Job("upcast", batch=1, sequence=32, threads=torch.get_num_threads())
    course = measure([job], 500)["upcast"]
    assert max(course.resident[20:]) - course.resident[19] < FLAT
    assert course.losses[0] > 1

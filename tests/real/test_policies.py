"""Policies on SmolLM2-135M-Instruct with its real weights: design.md's measured example, and what finds it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from benchmarks.suites.ablation import load
from tests.conftest import assert_patched, relative_error
from tests.integrations.litgpt.test_models import float32_model
from tests.real.test_model import TEXT
from upcast.analysis.runner import NONE, SAFE, Samples, answer, trial
from upcast.policy.policy import ALL, Policy

pytestmark = pytest.mark.real

SCALE = 4
NOT_ENOUGH = ["none", "norm", "sensitive", "norm+residual", "norm+linear", "residual+linear"]
ENOUGH = {"norm+residual+linear": 3e-3, "safe": 1e-5}


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> torch.Tensor:
    from litgpt import Tokenizer

    return Tokenizer(smollm2).encode(TEXT)[:32].long()[None]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    return load(smollm2, SCALE)


def test_the_textbook_list_is_not_enough_and_three_classes_are(model: Any, smollm2: Path, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        want = float32_model(smollm2)(tokens)
    with trial(model) as run:
        assert_patched(run.root)
        (sample,) = Samples([tokens], {})
        for text in NOT_ENOUGH:
            assert not answer(run.run(Policy.parse(text), sample)).isfinite().all(), text
        for text, limit in ENOUGH.items():
            assert relative_error(answer(run.run(Policy.parse(text), sample)), want) < limit, text


@pytest.mark.slow
def test_none_is_half_on_the_real_model(smollm2: Path, tokens: torch.Tensor) -> None:
    plain, patched = load(smollm2, 1).half(), upcast.patch(load(smollm2, 1), policy="none")
    with torch.inference_mode():
        assert torch.equal(patched(tokens), plain(tokens))


def test_the_culprit_and_the_policy_are_found(model: Any, tokens: torch.Tensor) -> None:
    found = upcast.diagnose(model, tokens)
    assert found.culprit is not None
    assert (found.culprit.module, found.culprit.op_class) == ("transformer.h.11.mlp.proj", "linear")
    assert found.culprit.largest == pytest.approx(99_600, rel=5e-3)
    assert "transformer.h.11.mlp.proj: linear output 99," in str(found)
    assert str(found.policy) == "linear+norm+residual"
    searched = upcast.search(model, tokens, modules=False, verbose=False)
    assert searched.policy == found.policy
    tried = {step.policy: step.finite for step in searched.steps}
    assert tried == {
        "none": False,
        "linear+norm+residual": True,
        "linear+norm": False,
        "linear+residual": False,
        "norm+residual": False,
    }
    assert {SAFE.classes, NONE.classes} == {ALL, frozenset()}


@pytest.mark.slow
def test_a_failing_policy_heals_in_generation(model: Any, smollm2: Path, tokens: torch.Tensor, capsys: Any) -> None:
    from litgpt.generate.base import generate

    def text(each: Any) -> list[int]:
        with torch.inference_mode():
            each.set_kv_cache(batch_size=1, max_seq_length=64)
            options = {"max_returned_tokens": 30, "temperature": 0.0, "include_prompt": False}
            found = generate(each, tokens[0, :20], **options).tolist()
            each.clear_kv_cache()
        return found

    want = text(float32_model(smollm2))
    upcast.patch(model, policy="sensitive", heal=True)
    capsys.readouterr()
    assert text(model) == want
    assert "from this step on linear runs in float32 too" in capsys.readouterr().err

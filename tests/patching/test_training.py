"""Training on top of a patched model: PEFT's LoRA, gradient checkpointing, clipping; and torch.compile."""

from typing import Any

import pytest
import torch

import upcast
from tests.conftest import assert_patched, fallbacks, half_weights, relative_error, rounded
from tests.transformers_models import IDS, TEXT, make

pytest.importorskip("transformers")

STEPS = 4


def llama(**changes: Any) -> Any:
    return make("LlamaForCausalLM", "LlamaConfig", {**TEXT, **changes})


def train(model: Any, clip: float | None = None) -> list[float]:
    """Return the losses of a few steps of AdamW on what can learn, then the norms that were clipped."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        if clip is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses + norms


@pytest.fixture
def with_lora() -> Any:
    peft = pytest.importorskip("peft")

    def wrap(model: Any, **changes: Any) -> Any:
        torch.manual_seed(1)
        settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 8, **changes}
        return peft.get_peft_model(model, peft.LoraConfig(**settings))

    return wrap


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_peft_learns_as_in_float32(with_lora: Any, clip: float | None, changes: dict[str, Any]) -> None:
    model = llama()
    want = train(with_lora(rounded(model), **changes), clip)
    patched = with_lora(upcast.patch(model), **changes)
    stored = {name: weight.stored.clone() for name, weight in half_weights(patched).items()}
    got = train(patched, clip)
    assert relative_error(torch.tensor(got), torch.tensor(want)) < 1e-5
    assert got[STEPS - 1] < got[0]
    assert stored
    assert all(torch.equal(weight.stored, stored[name]) for name, weight in half_weights(patched).items())
    trained = [p for p in patched.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and not isinstance(p, upcast.HalfWeight) for p in trained)


def test_peft_merges_into_a_weight(with_lora: Any) -> None:
    patched = with_lora(upcast.patch(llama()))
    train(patched)
    with torch.inference_mode():
        want = patched(IDS).logits
        merged = patched.merge_and_unload()
        assert relative_error(merged(IDS).logits, want) < 2e-3  # the sum is rounded to float16
    assert_patched(merged)


def test_gradient_checkpointing(with_lora: Any) -> None:
    losses = []
    for checkpointing in (False, True):
        model = upcast.patch(llama())
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        losses.append(train(with_lora(model)))
    assert relative_error(torch.tensor(losses[1]), torch.tensor(losses[0])) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions(attention: str) -> None:
    model = llama(attn_implementation=attention)
    with torch.inference_mode():
        want = rounded(model)(IDS).logits
        assert relative_error(upcast.patch(model)(IDS).logits, want) < 1e-5
    assert fallbacks(model).calls == {}


@pytest.mark.slow
def test_compiled_generation() -> None:
    model = upcast.patch(llama())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(IDS, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(IDS, **options), want)

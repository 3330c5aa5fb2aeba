"""PEFT's methods and Transformers' Trainer on a patched base: float32's gradients, merges and losses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.conftest import fallbacks, half_weights, relative_error, rounded
from tests.patching.test_training import IDS, llama

peft = pytest.importorskip("peft")

LAYERS = 4  # deep enough that the first block's gradients come through others
TOLERANCE, DEEP = 1e-5, 5e-5  # of a gradient: in the last block, and below it
LOSS_TOLERANCE = 1e-3

ATTENTION = ["q_proj", "v_proj", "down_proj"]

# name, its config's class, settings, whether it merges into the base
METHODS: list[tuple[str, str, dict[str, Any], bool]] = [
    ("lora", "LoraConfig", {"r": 4, "target_modules": ATTENTION, "lora_alpha": 8}, True),
    ("lora of all", "LoraConfig", {"r": 4, "target_modules": "all-linear"}, True),
    ("dora", "LoraConfig", {"r": 4, "target_modules": ATTENTION, "use_dora": True}, True),
    ("ia3", "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, True),
    ("prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"}, False),
]


def wrapped(model: Any, kind: str, settings: dict[str, Any]) -> Any:
    """Return ``model`` under the method, with adapters that are not at their start, where half the gradients are 0."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, getattr(peft, kind)(**settings))
    with torch.no_grad():
        for parameter in learning(adapted).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapted


def pair(kind: str, settings: dict[str, Any], order: str = "patch first") -> tuple[Any, Any]:
    """Return an adapted patched model, and float32 on the same rounded base with the same adapters."""
    base = llama(num_hidden_layers=LAYERS)
    want = wrapped(rounded(base), kind, settings)
    if order == "patch first":
        got = wrapped(upcast.patch(base), kind, settings)
    else:
        got = upcast.patch(wrapped(base, kind, settings))
    assert half_weights(got)
    with torch.no_grad():  # DoRA's magnitudes come from the base as it was: not yet rounded, if patched last
        for name, parameter in learning(got).items():
            want.get_parameter(name).copy_(parameter)
    return got, want


def learning(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("order", ["patch first", "patch last"])
@pytest.mark.parametrize(("kind", "settings"), [pytest.param(*row[1:3], id=row[0]) for row in METHODS])
def test_gradients_are_float32_s(kind: str, settings: dict[str, Any], order: str) -> None:
    got, want = pair(kind, settings, order)
    for model in (got, want):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: parameter.grad for name, parameter in learning(want).items()}
    assert set(learning(got)) == set(wanted)
    for name, parameter in learning(got).items():
        assert type(parameter) is torch.nn.Parameter
        assert float(wanted[name].norm()) > 0, name
        limit = TOLERANCE if f".{LAYERS - 1}." in name else DEEP
        assert relative_error(parameter.grad, wanted[name]) <= limit, name
    root = got if order == "patch last" else got.get_base_model()
    assert fallbacks(root).calls == {}


@pytest.mark.parametrize(("kind", "settings"), [pytest.param(*row[1:3], id=row[0]) for row in METHODS])
def test_saved_adapters_load_into_an_unpatched_model(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    got, _ = pair(kind, settings)
    got.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(rounded(llama(num_hidden_layers=LAYERS)), tmp_path)
    assert not half_weights(loaded)
    assert relative_error(logits(loaded), logits(got)) < TOLERANCE
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2 * sum(
        parameter.nbytes for parameter in learning(got).values()
    ) + 8192  # the adapters, and not the base


# of what these copy of the base, the copy learns
COPIES: dict[str, tuple[str, dict[str, Any]]] = {
    "a norm or another layer": ("LNTuningConfig", {"target_modules": ["down_proj"]}),
    "a head": ("ShadowConfig", {"task_type": "SEQ_CLS"}),
    "modules to save": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["score"]}),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_that_learned_is_loaded_with_all_its_digits(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name, settings = COPIES[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")

    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(llama().config)

    want = wrapped(rounded(base()), name, settings)
    want.save_pretrained(tmp_path)
    got = peft.PeftModel.from_pretrained(upcast.patch(base()), tmp_path)
    wanted, loaded = peft.get_peft_model_state_dict(want), peft.get_peft_model_state_dict(got)
    assert half_weights(got)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("order", ["patch first", "patch last"])
@pytest.mark.parametrize(("kind", "settings"), [pytest.param(*row[1:3], id=row[0]) for row in METHODS if row[3]])
def test_merging_gives_float32_s_sum_rounded_at_most_once(kind: str, settings: dict[str, Any], order: str) -> None:
    """What PEFT adds to a weight in place is rounded; DoRA assigns what it has computed: that is float32 as it is."""
    got, want = (model.merge_and_unload() for model in pair(kind, settings, order))
    assert half_weights(got)
    for name, parameter in got.named_parameters():
        if type(parameter) is torch.nn.Parameter:
            assert relative_error(parameter, want.get_parameter(name)) < 1e-6, name
    if settings.get("use_dora"):
        return
    wanted, base = want.state_dict(), llama(num_hidden_layers=LAYERS).state_dict()
    changed = 0
    for name, weight in half_weights(got).items():
        half = wanted[name].half()
        # the sum itself may differ in its last bit of float32, and then fall on the other side of a half
        assert float((weight.stored.float() - half.float()).abs().max()) <= float(half.abs().max()) * 2**-10, name
        assert float((weight.stored != half).float().mean()) < 0.01, name
        changed += not torch.equal(half, base[name].half())
    assert changed >= LAYERS


def trained(model: Any, folder: Path) -> tuple[list[float], list[float]]:
    """Return the losses and the norms of the gradients that Trainer logs in its three steps."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_grad_norm=0.1,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(12 * 7).view(12, 7) % 100 + 3]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry["loss"] for entry in logged], [entry["grad_norm"] for entry in logged]


def test_trainer_gives_float32_s_losses(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    got, want = pair("LoraConfig", {"r": 4, "target_modules": ATTENTION})
    start = {name: parameter.detach().clone() for name, parameter in learning(got).items()}
    (losses, norms), (wanted, wanted_norms) = (trained(model, tmp_path) for model in (got, want))
    assert len(losses) == len(wanted) == 3
    assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < LOSS_TOLERANCE
    assert norms == pytest.approx(wanted_norms, rel=1e-3)
    assert min(norms) > 0.1  # so that clipping has something to do
    assert all(not torch.equal(parameter, start[name]) for name, parameter in learning(got).items())
    assert half_weights(got)

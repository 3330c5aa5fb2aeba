"""Headroom in training: what is logged and when, by Transformers' Trainer, by Lightning's and in a bare loop."""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import half_weights
from tests.guard.test_backward import litgpt_lora, litgpt_loss, own_loss, peft_lora
from tests.patching.test_learning import IDS, LAYERS, adapted, learning, loss_of
from upcast.guard.headroom import block_of

BLOCKS = {f"headroom/{i}" for i in range(LAYERS + 2)} | {"headroom/least"}


def stepped(model: Any, headroom: Any, steps: int, loss: Any = loss_of) -> list[dict[str, float] | None]:
    optimizer = torch.optim.SGD(learning(model).values(), lr=0.1)
    figures = []
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.append(headroom.step())
    return figures


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("transformer.h.3.mlp.proj", "transformer.h.3"),
        ("base_model.model.model.layers.11.self_attn.q_proj.lora_A.default", "base_model.model.model.layers.11"),
        ("2.down", "2"),
        ("lm_head", "lm_head"),
        ("", "model"),
    ],
)
def test_block_of(module: str, block: str) -> None:
    assert block_of(module) == block


def test_one_of_so_many_steps_is_measured() -> None:
    model = upcast.patch(adapted())
    figures = stepped(model, upcast.Headroom(model, every=3), 7)
    assert [each is not None for each in figures] == [True, False, False] * 2 + [True]
    assert all(set(each) == BLOCKS for each in figures if each)
    assert figures[0] != figures[3]  # it has learned in between


def test_the_figures_are_diagnose_s(capsys: pytest.CaptureFixture[str]) -> None:
    model = upcast.patch(litgpt_lora())
    with torch.no_grad():
        model.transformer.h[1].mlp.proj.linear.weight.stored.mul_(2000)
    headroom = upcast.Headroom(model)
    loss = litgpt_loss(model)
    capsys.readouterr()
    figures = headroom.step()
    said = capsys.readouterr().err
    want = upcast.diagnose(model.eval(), torch.arange(40).view(2, 20)[:, :-1] % 90)
    largest: dict[str, float] = {}
    for site in want.sites:
        largest[block_of(site.module)] = max(largest.get(block_of(site.module), 0.0), site.largest)
    assert figures is not None
    assert set(figures) == {f"headroom/{block}" for block in largest} | {"headroom/least"}
    for block, value in largest.items():
        assert figures[f"headroom/{block}"] == pytest.approx(math.log2(65504 / value), abs=1e-4)
    assert figures["headroom/least"] == min(figures.values()) == figures["headroom/transformer.h.1"]
    assert "step 1: least headroom" in said
    assert "in transformer.h.1" in said
    assert loss.isfinite()


def test_a_number_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    model = upcast.patch(adapted())
    headroom = upcast.Headroom(model)
    with torch.no_grad():
        model[2].lora_b.fill_(math.inf)
    loss_of(model)
    figures = headroom.step()
    assert figures is not None
    assert figures["headroom/least"] == figures["headroom/2"] == -math.inf
    assert figures["headroom/1"] > 0
    assert "not finite, first in 2: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_a_measured_run_is_the_unmeasured_one(kind: str) -> None:
    """Random numbers and statistics go on as if nobody had looked; so do losses."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.Dropout(0.5) if kind == "dropout" else nn.BatchNorm1d(8)
        model = nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8))
        model.requires_grad_(False)
        model.lora = nn.Parameter(torch.randn(8, 8))
        return model.train()

    def loss(model: nn.Module) -> Tensor:
        x = torch.linspace(-1, 1, 32).view(4, 8)
        return (model(x @ model.lora)).square().mean()

    results = []
    for measured in (False, True):
        model = upcast.patch(make())
        headroom = upcast.Headroom(model, every=1)
        if not measured:
            headroom.close()
        figures = stepped(model, headroom, 4, loss)
        assert all((each is not None) is measured for each in figures)
        results.append((model.lora.detach().clone(), float(loss(model).detach()), *model[1].buffers()))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*results, strict=True))


def test_an_evaluation_in_between_is_not_what_is_measured() -> None:
    model = upcast.patch(adapted())
    headroom = upcast.Headroom(model)
    with torch.no_grad():
        model(IDS * 0)
    assert headroom.step() is None
    loss_of(model)
    assert headroom.step() is not None


def test_nothing_is_left_on_the_model() -> None:
    model = upcast.patch(adapted())
    before = copy.copy(model.__dict__["_forward_pre_hooks"]), {k: set(vars(m)) for k, m in model.named_modules()}
    headroom = upcast.Headroom(model, every=2)
    stepped(model, headroom, 3)
    headroom.close()
    assert before == (model._forward_pre_hooks, {k: set(vars(m)) for k, m in model.named_modules()})
    assert not any("_upcast" in vars(parameter) for parameter in model.parameters())


REFUSED: list[tuple[str, Any, int, str]] = [
    ("not patched", adapted, 100, r"holds no patched model.*upcast\.patch\(model\) before training"),
    ("every", lambda: upcast.patch(adapted()), 0, r"every=0; .*Use 1 or more"),
]


@pytest.mark.parametrize(("make", "every", "message"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_refused(make: Any, every: int, message: str) -> None:
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.Headroom(make(), every=every)


@pytest.mark.parametrize(
    ("name", "library", "module"),
    [
        ("HeadroomCallback", "transformers", "transformers.trainer"),
        ("LightningHeadroomCallback", "lightning", "lightning.callback"),
        ("FabricPrecision", "lightning", "lightning.fabric"),
    ],
)
def test_without_its_library(monkeypatch: pytest.MonkeyPatch, name: str, library: str, module: str) -> None:
    monkeypatch.delitem(vars(upcast), name, raising=False)  # where another test has asked for it
    monkeypatch.delitem(sys.modules, f"upcast.integrations.{module}", raising=False)
    for each in [each for each in sys.modules if each.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, each, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(upcast.UpcastError, match=rf"upcast\.{name} without .*Run `pip install {library}`"):
        getattr(upcast, name)


# --- Transformers' Trainer --------------------------------------------------------------------------------------------


def trainer_of(model: Any, folder: Path, callback: Any, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
        **settings,
    )
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(20 * 7).view(20, 7) % 100 + 3]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_logs_headroom(tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("accelerate")
    model = upcast.patch(peft_lora())
    assert half_weights(model)
    trainer = trainer_of(model, tmp_path, upcast.HeadroomCallback(every=2), gradient_checkpointing=checkpointing)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "headroom/least" in entry]
    assert [entry["step"] for entry in logged] == [1, 3, 5]
    blocks = {f"headroom/base_model.model.model.layers.{i}" for i in range(model.config.num_hidden_layers)}
    assert all(blocks <= set(entry) for entry in logged)
    assert all(0 < entry["headroom/least"] < 20 for entry in logged)
    assert not model._forward_pre_hooks


def test_the_trainer_s_own_loggers_get_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    callback = upcast.HeadroomCallback(every=5)
    trainer = trainer_of(peft_of_a_patched_model(), tmp_path, callback)
    callback.log = trainer.log
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "headroom/least" in entry]
    assert [(entry["step"], "epoch" in entry) for entry in logged] == [(1, True)]  # an entry of `log` has the epoch


def peft_of_a_patched_model() -> Any:
    """The patched model is inside of the one that is trained."""
    import peft

    from tests.patching.test_training import llama

    return peft.get_peft_model(upcast.patch(llama()), peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_the_trainer_says_when_nothing_is_patched(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(upcast.UpcastError, match="PeftModel holds no patched model"):
        trainer_of(peft_lora(), tmp_path, upcast.HeadroomCallback()).train()


def test_guard_speaks_through_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = upcast.patch(peft_lora(), guard=True)
    trainer = trainer_of(model, tmp_path, upcast.HeadroomCallback())
    with torch.no_grad():
        next(iter(learning(model).values())).fill_(math.inf)
    with pytest.raises(upcast.UpcastError, match=r"not finite in training step 1.*first in .*layers\.0"):
        trainer.train()


# --- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # Lightning's own, under torch 2.13
@pytest.mark.filterwarnings("ignore:.*many workers:UserWarning")
def test_lightning_s_trainer_logs_headroom() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = upcast.patch(peft_lora().train())
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = own_loss(self.model)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(learning(self).values(), lr=0.1)

    seen: list[dict[str, float]] = []

    class Last(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith("headroom/")})

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=5,
        callbacks=[upcast.LightningHeadroomCallback(every=4), Last()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, torch.utils.data.DataLoader(list(range(5))))
    assert module.losses[-1] < module.losses[0]
    assert half_weights(module)
    figures = trainer.callback_metrics
    assert 0 < float(figures["headroom/least"]) < 20
    assert any(key.endswith("layers.1") for key in figures)
    assert not module.model._forward_pre_hooks

"""guard in training: planted overflows, forward and backward, are named with module, operation and step."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upcast
from tests.conftest import half_weights
from tests.litgpt_checkpoints import small_config
from tests.patching.test_training import IDS as TEXT_IDS
from tests.patching.test_training import llama
from upcast.guard.backward import tensors

IDS = torch.arange(40).view(2, 20) % 90
AT = 3  # the training step in which a planted operation goes wrong


class Planted(nn.Module):
    """A layer that goes wrong in one training step: in its result, or only in its gradient."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.layer, self.kind, self.wrong = layer, kind, False

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if not self.wrong:
            return y
        if self.kind == "forward":
            return y.exp() * 3e38 * 1e3
        return y + (y * 0).abs().sqrt()  # 0, whose gradient is infinity times zero


def plant(model: nn.Module, name: str, kind: str) -> nn.Module:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, Planted(model.get_submodule(name), kind))
    return model


def go_wrong(model: nn.Module, wrong: bool = True) -> None:
    for module in model.modules():
        if isinstance(module, Planted):
            module.wrong = wrong


def litgpt_lora(dropout: float = 0.0) -> nn.Module:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    shape = asdict(small_config("SmolLM2-135M-Instruct"))
    settings = {"lora_r": 2, "lora_query": True, "lora_value": True, "lora_dropout": dropout}
    model = GPT(Config(**{**shape, **settings}))
    mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data, std=0.02)
    return model


def litgpt_loss(model: Any) -> Tensor:
    return F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def chunked_loss(model: Any) -> Tensor:
    from litgpt.utils import chunked_cross_entropy

    return chunked_cross_entropy(model(IDS[:, :-1], lm_head_chunk_size=8), IDS[:, 1:])


def peft_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def checkpointed() -> nn.Module:
    model = peft_lora()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def own_loss(model: Any) -> Tensor:
    return model(input_ids=TEXT_IDS, labels=TEXT_IDS).loss


# name, the model, its loss, the layer that goes wrong
CASES: list[tuple[str, Callable[[], nn.Module], Callable[[Any], Tensor], str]] = [
    ("litgpt", litgpt_lora, litgpt_loss, "transformer.h.1.mlp.proj"),
    ("litgpt, logits in chunks", litgpt_lora, chunked_loss, "transformer.h.1.attn.proj"),
    ("litgpt, dropout", lambda: litgpt_lora(0.5), litgpt_loss, "transformer.h.1.mlp.proj"),
    ("peft", peft_lora, own_loss, "base_model.model.model.layers.1.mlp.down_proj"),
    ("peft, gradient checkpointing", checkpointed, own_loss, "base_model.model.model.layers.1.mlp.down_proj"),
]
EACH = pytest.mark.parametrize(("make", "loss", "layer"), [pytest.param(*rest, id=name) for name, *rest in CASES])


def run(model: nn.Module, loss: Callable[[Any], Tensor], steps: int = AT) -> list[float]:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.01)
    losses = []
    for step in range(1, steps + 1):
        go_wrong(model, step == AT)
        each = loss(model)
        each.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(each.detach()))
    return losses


@EACH
@pytest.mark.parametrize(("kind", "op", "backward"), [("forward", "mul", ""), ("backward", "sqrt", "backward pass")])
def test_the_first_module_operation_and_step_are_named(
    make: Any, loss: Any, layer: str, kind: str, op: str, backward: str
) -> None:
    model = upcast.patch(plant(make(), layer, kind), guard=True)
    assert half_weights(model)
    with pytest.raises(upcast.UpcastError, match=f"is not finite in training step {AT}") as error:
        run(model, loss)
    assert f"first in {layer}: " in str(error.value)
    assert op in str(error.value)
    assert backward in str(error.value)


@EACH
def test_a_watched_run_is_the_unwatched_one(make: Any, loss: Any, layer: str) -> None:
    model = make()
    losses = []
    for guard in (False, True):
        each = upcast.patch(copy.deepcopy(model), guard=guard)
        torch.manual_seed(1)
        losses.append(run(each, loss))
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == AT  # it learns


def test_random_numbers_are_those_of_the_failing_step() -> None:
    """A layer that goes wrong for one draw in four: the step run again must draw the same."""

    class Unlucky(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return y + (y * 0).abs().sqrt() if float(torch.rand(())) < 0.25 else y

    for seed in range(8):
        model = litgpt_lora(0.5)
        model.transformer.h[1].mlp.proj = Unlucky(model.transformer.h[1].mlp.proj)
        upcast.patch(model, guard=True)
        torch.manual_seed(seed)
        with pytest.raises(upcast.UpcastError, match=r"first in transformer\.h\.1\.mlp\.proj: norm \(sqrt\)"):
            run(model, litgpt_loss, 100)


def test_fabric_s_loop_is_watched() -> None:
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=upcast.FabricPrecision(guard=True))
    inner = plant(litgpt_lora(), "transformer.h.1.mlp.proj", "backward")
    model, _ = fabric.setup(inner, torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1))
    fabric.backward(litgpt_loss(model))
    go_wrong(inner)
    loss = litgpt_loss(model)
    with pytest.raises(
        upcast.UpcastError, match=r"training step 2; first in transformer\.h\.1\.mlp\.proj: norm \(sqrt"
    ):
        fabric.backward(loss)


def test_gradients_from_before_the_failing_pass_are_left() -> None:
    model = upcast.patch(plant(litgpt_lora(), "transformer.h.1.mlp.proj", "backward"), guard=True)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(AT - 1):
        litgpt_loss(model).backward()
    go_wrong(model)
    late = [name for name in learning if ".1." in name]
    with pytest.raises(upcast.UpcastError, match=f"training step {AT}"):
        litgpt_loss(model).backward()
    assert all(learning[name].grad is not None for name in late)


def test_something_learned_outside_the_model() -> None:
    """As in prompt tuning: the model's own parameters are all frozen, and its input requires grad."""
    inner = plant(llama().requires_grad_(False), "model.layers.1.mlp.down_proj", "backward")
    go_wrong(inner)
    model = upcast.patch(inner, guard=True)
    prompt = nn.Parameter(torch.randn(1, 4, model.config.hidden_size))
    with pytest.raises(
        upcast.UpcastError, match=r"gradient of its inputs is not finite in training step 1; first in mod"
    ):
        model(inputs_embeds=prompt * 2).logits.sum().backward()


# name, what the loss becomes, what the error says
LOSSES: list[tuple[str, Callable[[Any], Tensor], str]] = [
    (
        "of the model",
        lambda model: model(input_ids=TEXT_IDS, labels=torch.full_like(TEXT_IDS, -100)).loss,
        "the labels",
    ),
    ("NaN outside", lambda model: model(input_ids=TEXT_IDS).logits.sum() * float("nan"), "what computes the loss"),
]


@pytest.mark.parametrize(("loss", "message"), [pytest.param(*rest, id=name) for name, *rest in LOSSES])
def test_a_loss_that_is_not_finite(loss: Callable[[Any], Tensor], message: str) -> None:
    model = upcast.patch(peft_lora(), guard=True)
    own_loss(model).backward()
    with pytest.raises(upcast.UpcastError, match=rf"in training step 2.*{message}"):
        loss(model).backward()
    unguarded = loss(upcast.patch(peft_lora()))  # and without the guard nobody says so
    unguarded.backward()
    assert not unguarded.isfinite()


def test_what_a_model_returns_by_name() -> None:
    a, b = torch.ones(2), torch.zeros(3)
    assert [name for name, _ in tensors({"loss": a, "more": [b, b], "ids": torch.arange(2)})] == [
        "loss",
        "more[0]",
        "more[1]",
    ]
    assert [name for name, _ in tensors((a, None, b))] == ["result[0]", "result[2]"]


def test_inference_with_gradients_enabled_is_no_training() -> None:
    model = upcast.patch(llama().requires_grad_(False), guard=True)
    model(TEXT_IDS)
    assert model.forward.backward.steps == 0
    trained = upcast.patch(litgpt_lora(), guard=True)
    litgpt_loss(trained).backward()
    assert trained.forward.backward.steps == 1
    assert copy.deepcopy(trained).forward.backward.module is not trained

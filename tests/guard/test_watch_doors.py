"""guard and heal by every door: what a generation loop calls is the encoder, or the model inside the one patched."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import FAMILIES, make
from upcast import UpcastError
from upcast.guard.forward import GuardedForward

# class, where the encoder overflows, the layer behind it
ENCODERS = [
    ("T5ForConditionalGeneration", "encoder.block.0.layer.1.DenseReluDense.wi"),
    ("WhisperForConditionalGeneration", "model.encoder.layers.0.fc1"),
]
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 0}


def overflowing(kind: str, where: str) -> tuple[Any, dict[str, Any]]:
    """Return a model with a linear layer whose results are beyond 65504, and the inputs of its encoder."""
    row = next(row for row in FAMILIES if row[0] == kind)
    model = make(*row[:3])
    layer = model.get_submodule(where)
    with torch.no_grad():
        layer.weight.mul_(3e4 / layer.weight.abs().max())
    return model, {name: value for name, value in row[3].items() if not name.startswith("decoder")}


@pytest.mark.parametrize(("kind", "where"), ENCODERS)
@pytest.mark.parametrize("policy", ["none", "sensitive"])
def test_an_encoder_is_healed_and_guarded_in_generate(kind: str, where: str, policy: str, capsys: Any) -> None:
    model, inputs = overflowing(kind, where)
    want = model.generate(**inputs, **OPTIONS)
    healed = upcast.patch(copy.deepcopy(model), policy=policy, heal=True)
    capsys.readouterr()
    assert torch.equal(healed.generate(**inputs, **OPTIONS), want)
    assert capsys.readouterr().err.count("from this step on linear+activation runs in float32") == 1
    guarded = upcast.patch(model, policy=policy, guard=True)
    with pytest.raises(UpcastError, match=f"not finite under policy {policy}; first in {where}: linear output"):
        guarded.generate(**inputs, **OPTIONS)


def test_a_decoder_behind_an_encoder_is_healed_in_the_middle(capsys: Any) -> None:
    row = next(row for row in FAMILIES if row[0] == "T5ForConditionalGeneration")
    model = make(*row[:3])

    class Late(nn.Module):
        """Overflows from the fourth token on, and leaves no trace in float32."""

        calls = 0

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large = torch.full_like(x, 300.0 if Late.calls > 3 else 1.0)
            return self.inner(x) + (large * large * 0.0).mean()

    feed_forward = model.decoder.block[1].layer[2]
    feed_forward.DenseReluDense = Late(feed_forward.DenseReluDense)
    count = lambda module, args, kwargs: setattr(Late, "calls", Late.calls + 1)  # noqa: E731

    def tokens(each: Any) -> list[int]:
        Late.calls = 0
        handle = each.register_forward_pre_hook(count, with_kwargs=True)
        found: list[int] = each.generate(input_ids=row[3]["input_ids"], **OPTIONS).tolist()
        handle.remove()
        return found

    want = tokens(model)
    healed = upcast.patch(copy.deepcopy(model), policy="linear+norm+softmax+scores+residual", heal=True)
    capsys.readouterr()
    assert tokens(healed) == want
    assert capsys.readouterr().err.count("from this step on activation runs in float32") == 1
    with pytest.raises(UpcastError, match=r"first in decoder\.block\.1\.layer\.2\.DenseReluDense: activation"):
        tokens(upcast.patch(model, policy="sensitive", guard=True))


def spoil(state: dict[str, torch.Tensor]) -> None:
    state["transformer.h.1.mlp.proj.weight"].mul_(4e5)


def litgpt_llm(tmp_path: Path) -> tuple[Any, Callable[[Any], Any]]:
    from litgpt import LLM

    folder = write_checkpoint(tmp_path / "model", small_config("Llama-3.2-1B"), spoil=spoil)
    llm = LLM.load(str(folder), distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    options = {"max_new_tokens": 8, "top_k": 1, "return_as_token_ids": True}
    return llm, lambda each: each.generate("What do llamas eat?", **options).tolist()


def peft_model(tmp_path: Path) -> tuple[Any, Callable[[Any], Any]]:
    peft = pytest.importorskip("peft")
    model, _ = overflowing("LlamaForCausalLM", "model.layers.1.mlp.up_proj")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    ids = torch.arange(3, 10)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return adapted, lambda each: each.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options).tolist()


DOORS = [
    pytest.param(litgpt_llm, r"transformer\.h\.1\.mlp\.proj: linear output", id="litgpt LLM"),
    pytest.param(peft_model, r"model\.layers\.1\.mlp\.up_proj: linear output", id="peft"),
]


@pytest.mark.parametrize(("build", "where"), DOORS)
def test_a_model_inside_the_patched_one_is_watched(build: Any, where: str, tmp_path: Path, capsys: Any) -> None:
    model, tokens = build(tmp_path)
    want = tokens(model)
    upcast.patch(model, policy="sensitive", guard=True)
    with pytest.raises(UpcastError, match=rf"not finite under policy sensitive; first in .*{where}"):
        tokens(model)
    upcast.unpatch(model)
    assert not any(isinstance(each.__dict__.get("forward"), GuardedForward) for each in model.modules())
    upcast.patch(model, policy="sensitive", heal=True)
    capsys.readouterr()
    assert tokens(model) == want
    assert capsys.readouterr().err.count("from this step on linear") == 1


def test_the_outermost_of_one_model_watches_and_other_models_watch_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []
    mend = GuardedForward._mend

    def noted(self: GuardedForward, *args: Any) -> Any:
        watched.append(type(self.module).__name__)
        return mend(self, *args)

    monkeypatch.setattr(GuardedForward, "_mend", noted)
    model, inputs = overflowing(*ENCODERS[0])
    upcast.patch(model, policy="none", heal=True)
    model(**inputs, decoder_input_ids=inputs["input_ids"])
    assert watched == ["T5ForConditionalGeneration"]

    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.inner = [inner]  # a model of its own, not a part

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner[0](**inputs, decoder_input_ids=inputs["input_ids"])
            return self.linear(x)

    other, _ = overflowing(*ENCODERS[0])
    upcast.patch(other, policy="none", heal=True)
    watched.clear()
    upcast.patch(Outer(other), policy="none", heal=True)(torch.ones(1, 4))
    assert watched == ["T5ForConditionalGeneration"]
    assert str(upcast.patching.engine.record_of(other).policy) == "linear+activation"

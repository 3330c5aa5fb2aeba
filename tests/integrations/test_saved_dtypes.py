"""A saved model names the dtype of its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import half_weights, relative_error
from tests.integrations.test_loading import IDS, KINDS, SIZES, logits, write
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import make

transformers = pytest.importorskip("transformers")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def without_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain loads are those of a machine without upcast; tests/integrations/transformers/test_quantizer.py has it."""
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "upcast", raising=False)


SAVED = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float16,  # its norms are ones here, which float16 holds
    torch.float32: torch.float16,
}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_config_names_the_dtype_of_the_weights(
    tmp_path: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = upcast.from_pretrained(transformers.AutoModelForCausalLM, write(tmp_path / "a", kind, dtype))
    before = model.config.to_dict()
    model.save_pretrained(tmp_path / "b", **options)
    assert "save_pretrained" not in vars(model.config)
    assert str(model.config.dtype) in ("float32", "torch.float32")
    assert model.config.to_dict().keys() == before.keys()
    content = json.loads((tmp_path / "b" / "config.json").read_text())
    assert content["dtype"] == "float16"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in plain.parameters()} == {torch.float16}
    again = upcast.from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    assert relative_error(logits(plain.float()), logits(model)) < 1e-5


def test_what_float16_would_lose_is_saved_and_named_float32(tmp_path: Path) -> None:
    model = make("LlamaForCausalLM", "LlamaConfig", SIZES)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.randn(64))
    upcast.patch(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.model.norm.weight, model.model.norm.weight)
    assert relative_error(logits(plain), logits(model)) < 1e-6


def test_parts_of_a_config_are_named_too(tmp_path: Path) -> None:
    text = {**SIZES, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    transformers.LlavaForConditionalGeneration(config).half().save_pretrained(tmp_path / "a")
    model = upcast.from_pretrained(transformers.LlavaForConditionalGeneration, tmp_path / "a")
    assert half_weights(model)
    model.save_pretrained(tmp_path / "b")
    transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("c", "b")]
    for part in ("text_config", "vision_config"):
        assert written[1][part].get("dtype") == written[0][part].get("dtype")
    assert written[1]["dtype"] == written[0]["dtype"] == "float16"


def test_an_unpatched_model_is_saved_as_ever(tmp_path: Path) -> None:
    upcast.from_pretrained(transformers.AutoModelForCausalLM, write(tmp_path / "a"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_llm_save_and_fabric_save(tmp_path: Path) -> None:
    pytest.importorskip("litgpt")
    from lightning import Fabric
    from litgpt import LLM

    folder = write_checkpoint(tmp_path / "a", small_config("SmolLM2-135M-Instruct"))
    llm = LLM.load(str(folder), distribute=None)
    model = upcast.load_litgpt(folder)
    fabric = Fabric(accelerator="cpu", devices=1)
    llm.model, llm.fabric = fabric.setup_module(model), fabric
    llm.save(tmp_path / "b")
    fabric.save(tmp_path / "c.pth", {"model": llm.model})
    with torch.inference_mode():
        want = model(IDS)
        assert torch.equal(upcast.load_litgpt(tmp_path / "b")(IDS), want)
    state = torch.load(tmp_path / "c.pth")["model"]
    source = torch.load(folder / "lit_model.pth")
    assert {name.removeprefix("_forward_module.") for name in state} == set(source)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), source[name.removeprefix("_forward_module.")].float()), name

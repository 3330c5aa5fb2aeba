"""Moving a patched model off the CPU is refused with the remedy, and changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched


@pytest.mark.parametrize("convert", [{"device": "meta"}, {"device": "meta", "dtype": torch.float32}])
def test_moving_to_another_device_is_refused_and_changes_nothing(convert: dict[str, Any]) -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Linear(129, 7)).eval())
    x = torch.randn(5, 33)
    want = model(x)
    with pytest.raises(upcast.UpcastError, match=r"to meta.*upcast\.unpatch\(model\) first"):
        model.to(**convert)
    assert_patched(model)
    assert torch.equal(model(x), want)
    assert upcast.unpatch(model).to("meta")[0].weight.is_meta  # the remedy it names


MOVED = """
import torch, transformers
from tokenizers import Tokenizer, models
words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
model = transformers.LlamaForCausalLM.from_pretrained("model")
ways = {
    "to": lambda: model.to("DEVICE"),
    "to device": lambda: model.to(torch.device("DEVICE")),
    "pipeline": lambda: transformers.pipeline("text-generation", model="model", tokenizer=words, device="DEVICE"),
    "pipeline of a model": lambda: transformers.pipeline("text-generation", model, tokenizer=words, device="DEVICE"),
}
for way in ways.values():
    try:
        way()
    except Exception as error:
        print(type(error).__name__, error)
    print("#", type(model.lm_head.weight).__name__, model.device)
"""


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_under_the_environment_the_refusal_says_how_to_switch_it_off(python: Run, tmp_path: Path, device: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "model")
    result = python("-c", MOVED.replace("DEVICE", device), UPCAST="1")
    errors, models = result.stdout.splitlines()[::2], result.stdout.splitlines()[1::2]
    assert result.returncode == 0, result.stderr
    assert models == ["# HalfWeight cpu"] * 4, result.stdout
    if device == "cuda" and not torch.backends.cuda.is_built():  # torch refuses first, as for every model
        assert errors == ["AssertionError Torch not compiled with CUDA enabled"] * 4
    else:
        assert all("upcast.unpatch(model) first. UPCAST=1 patched it" in line and "UPCAST=0" in line for line in errors)


def test_without_the_environment_it_does_not_speak_of_it() -> None:
    model = upcast.patch(torch.nn.Linear(3, 3).eval())
    with pytest.raises(upcast.UpcastError) as refused:
        model.half()
    assert "UPCAST" not in str(refused.value)

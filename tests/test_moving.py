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
import sys, torch, transformers
from tokenizers import Tokenizer, models
words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
model = transformers.LlamaForCausalLM.from_pretrained("model")
ways = {
    "to": lambda device: model.to(device),
    "to device": lambda device: model.to(torch.device(device)),
    "pipeline": lambda device: transformers.pipeline("text-generation", "model", tokenizer=words, device=device),
    "of a model": lambda device: transformers.pipeline("text-generation", model, tokenizer=words, device=device),
}
for device in sys.argv[1:]:
    for way in ways.values():
        try:
            way(device)
        except Exception as error:
            print(type(error).__name__, error)
        print("#", type(model.lm_head.weight).__name__, model.device)
"""


def test_under_the_environment_the_refusal_says_how_to_switch_it_off(python: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "model")
    result = python("-c", MOVED, "meta", "cuda", UPCAST="1")
    errors, models = result.stdout.splitlines()[::2], result.stdout.splitlines()[1::2]
    assert result.returncode == 0, result.stderr
    assert models == ["# HalfWeight cpu"] * 8, result.stdout
    if not torch.backends.cuda.is_built():  # torch refuses first, as for every model
        assert errors[4:] == ["AssertionError Torch not compiled with CUDA enabled"] * 4
        errors = errors[:4]
    assert all("upcast.unpatch(model) first. UPCAST=1 patched it" in line and "UPCAST=0" in line for line in errors)


def test_without_the_environment_it_does_not_speak_of_it() -> None:
    model = upcast.patch(torch.nn.Linear(3, 3).eval())
    with pytest.raises(upcast.UpcastError) as refused:
        model.half()
    assert "UPCAST" not in str(refused.value)

"""A patched model that is moved off the CPU goes there, unpatched, and upcast says so."""

from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched


@pytest.mark.parametrize("convert", [{"device": "meta"}, {"device": "meta", "dtype": torch.float32}])
def test_a_model_that_is_moved_is_not_patched_any_more(convert: dict[str, Any]) -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Linear(129, 7)).eval())
    assert model.to(**convert)[0].weight.is_meta
    with pytest.raises(upcast.UpcastError, match="not patched"):
        upcast.report(model)


def test_a_move_that_fails_changes_nothing() -> None:
    if torch.backends.cuda.is_built():
        pytest.skip("this torch could move it")
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Linear(129, 7)).eval())
    with pytest.raises(AssertionError, match="CUDA"):
        model.to("cuda")
    assert_patched(model)


MOVED = """
import torch, transformers
from tokenizers import Tokenizer, models
words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
ways = {
    "to": lambda device: model.to(device),
    "to device": lambda device: model.to(torch.device(device)),
    "pipeline": lambda device: transformers.pipeline("text-generation", "model", tokenizer=words, device=device).model,
    "of a model": lambda device: transformers.pipeline("text-generation", model, tokenizer=words, device=device).model,
}
for way in ways.values():
    model = transformers.LlamaForCausalLM.from_pretrained("model")
    print(type(model.lm_head.weight).__name__, way("meta").device)
"""


def test_under_the_environment_models_move_as_without(python_with_libraries: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "model")
    result = python_with_libraries("-c", MOVED, UPCAST="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["HalfWeight meta"] * 4
    assert result.stderr.count("LlamaForCausalLM is converted to meta, as the program says") == 4

"""On a Mac LitGPT and pipelines take MPS where nobody has chosen: under UPCAST=1 the CPU, with one line. Simulated."""

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")

MAC = """
import torch
torch.backends.mps.is_available = lambda: True
from litgpt import LLM
import upcast
{load}
{patched}
"""
PATCHED = """
assert isinstance(llm.model.lm_head.weight, upcast.HalfWeight), type(llm.model.lm_head.weight)
llm.generate("What do Llamas eat?", max_new_tokens=3)
print("finished")
"""
LINE = "chose the CPU, where upcast works, not MPS"

LOADS = {  # -> whether upcast chose
    'llm = LLM.load("checkpoint")': True,
    'llm = LLM.load("checkpoint", distribute=None); llm.distribute()': True,
    'llm = LLM.load("checkpoint", distribute=None); llm.distribute(accelerator="cpu")': False,
}


@pytest.mark.parametrize("load", LOADS)
def test_the_cpu_where_nobody_has_chosen(python_with_libraries: Run, tmp_path: Path, load: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    result = python_with_libraries("-c", MAC.format(load=load, patched=PATCHED), UPCAST="1")
    assert "finished" in result.stdout, result.stderr
    assert result.stderr.count(LINE) == LOADS[load]


def test_who_chose_mps_gets_what_litgpt_gives(python_with_libraries: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    load = """
llm = LLM.load("checkpoint", distribute=None)
try:
    llm.distribute(accelerator="mps")
except Exception as error:
    print(type(error).__name__, str(error)[:60])
"""
    plain, ours = (python_with_libraries("-c", MAC.format(load=load, patched=""), UPCAST=on) for on in ("0", "1"))
    assert ours.stdout == plain.stdout != ""
    assert LINE not in ours.stderr


PIPELINES = """
import torch
torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from tokenizers import Tokenizer, models
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2)).save_pretrained("model")
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 1, "?": 0}, unk_token="?")))
torch.nn.Module.to = lambda self, *to, **_: self  # what MPS does cannot be seen here
for options in ({}, {"device": "cpu"}, {"device": "mps"}, {"device": 0}):
    model = LlamaForCausalLM.from_pretrained("model")
    pipe = pipeline("text-generation", model=model, tokenizer=words, **options)
    print(type(model.lm_head.weight).__name__, pipe.device)
"""
DEVICES = {
    "0": ["mps:0", "cpu", "mps", "mps:0"],
    "1": ["cpu", "cpu", "mps", "mps:0"],
}  # UPCAST -> without one, and with


@pytest.mark.parametrize("value", DEVICES)
def test_a_pipeline_stays_where_nobody_has_chosen(python_with_libraries: Run, value: str) -> None:
    done = python_with_libraries("-c", PIPELINES, UPCAST=value)
    kind = "HalfWeight" if value == "1" else "Parameter"
    assert done.stdout.splitlines() == [f"{kind} {device}" for device in DEVICES[value]], done.stderr
    assert done.stderr.count("a pipeline " + LINE) == (value == "1")

"""On a Mac LitGPT takes MPS where nobody has chosen: under UPCAST=1 the CPU, with one line. Simulated."""

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
def test_the_cpu_where_nobody_has_chosen(python: Run, tmp_path: Path, load: str) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    result = python("-c", MAC.format(load=load, patched=PATCHED), UPCAST="1")
    assert "finished" in result.stdout, result.stderr
    assert result.stderr.count(LINE) == LOADS[load]


def test_who_chose_mps_gets_what_litgpt_gives(python: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    load = """
llm = LLM.load("checkpoint", distribute=None)
try:
    llm.distribute(accelerator="mps")
except Exception as error:
    print(type(error).__name__, str(error)[:60])
"""
    plain, ours = (python("-c", MAC.format(load=load, patched=""), UPCAST=on) for on in ("0", "1"))
    assert ours.stdout == plain.stdout != ""
    assert LINE not in ours.stderr

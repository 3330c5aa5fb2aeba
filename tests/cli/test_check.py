"""``python -m upcast check``: the answer to what most people ask of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.litgpt_checkpoints import small_config, write_checkpoint, write_tokenizer
from tests.transformers_models import make
from upcast.cli.main import main

pytest.importorskip("litgpt")
TEXT = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def loud(state: dict[str, torch.Tensor]) -> None:
    """Give one block an output that float16 does not hold; its weights do."""
    for name in ("transformer.h.1.mlp.fc.weight", "transformer.h.1.mlp.proj.weight"):
        state[name].mul_(2000)


def transformers_folder(folder: Path) -> Path:
    make("LlamaForCausalLM", "LlamaConfig", TEXT).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


# name -> what writes the folder, whether plain float16 overflows, the dtypes on disk, what is to be run next
FOLDERS: dict[str, tuple[Any, bool, list[str], str]] = {
    "litgpt": (lambda path: write_checkpoint(path, small_config("pythia-160m")), False, ["float16"], "generate"),
    "litgpt, bfloat16": (
        lambda path: write_checkpoint(path, small_config("pythia-160m"), torch.bfloat16),
        *(False, ["bfloat16"], "convert"),
    ),
    "overflows": (
        lambda path: write_checkpoint(path, small_config("pythia-160m"), spoil=loud),
        *(True, ["float16"], "generate"),
    ),
    "transformers": (transformers_folder, False, ["bfloat16"], "UPCAST=1 python program.py"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_findings(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, overflows, dtypes, command = FOLDERS[name]
    assert main(["check", str(write(tmp_path / "model")), "--json"]) == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["overflows"] is overflows
    assert (found["culprit"] is not None) == overflows
    if overflows:
        assert "h.1.mlp" in found["culprit"]
    else:
        assert 0 < found["float16_error"] < 0.1
        assert found["headroom_bits"] > 0
    assert found["dtypes"] == dtypes
    assert command in found["next"]
    assert found["float32_bytes"] > 1.7 * found["bytes_after"]
    assert found["seconds_per_token"] > 0
    assert found["prompt_tokens_per_second"] > 0
    assert "timing" not in output.err  # no progress into a pipe


def test_the_listing_is_readable_at_40_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", small_config("pythia-160m"), spoil=loud)
    assert main(["check", str(folder), "--text", "What do Llamas eat?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    topics = ["checkpoint", "plain float16", "with upcast", "memory", "speed here", "next"]
    assert [line[:15].strip() for line in lines] == topics
    assert "OVERFLOWS on 19 tokens" in lines[1]


def test_what_is_no_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert "is no checkpoint folder" in capsys.readouterr().err

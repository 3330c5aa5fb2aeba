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
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
TEXT = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def loud(state: dict[str, torch.Tensor]) -> None:
    """Give one block an output that float16 does not hold; its weights do."""
    for name in ("transformer.h.1.mlp.fc.weight", "transformer.h.1.mlp.proj.weight"):
        state[name].mul_(2000)


def transformers_folder(folder: Path) -> Path:
    make("LlamaForCausalLM", "LlamaConfig", TEXT).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def of_a_class(kind: str, config: str, sizes: dict[str, Any]) -> Any:
    def write(folder: Path) -> Path:
        make(kind, config, sizes).save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return write


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
    "a classifier": (
        of_a_class("BertForSequenceClassification", "BertConfig", TEXT),
        *(False, ["float32"], "upcast.from_pretrained(BertForSequenceClassification, folder)"),
    ),
    "an encoder and a decoder": (
        of_a_class("T5ForConditionalGeneration", "T5Config", {**T5, "vocab_size": 320}),
        *(False, ["float32"], "upcast.from_pretrained(T5ForConditionalGeneration, folder)"),
    ),
}
WRITES_NOTHING = {"a classifier"}


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
    assert (found["seconds_per_token"] is None) if name in WRITES_NOTHING else (found["seconds_per_token"] > 0)
    assert found["prompt_tokens_per_second"] > 0
    assert "timing" not in output.err  # no progress into a pipe
    assert "MISSING" not in output.err  # the class whose weights were saved, not one with another head


def test_the_listing_is_readable_at_40_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "model", small_config("pythia-160m"), spoil=loud)
    assert main(["check", str(folder), "--text", "What do Llamas eat?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    topics = ["checkpoint", "plain float16", "with upcast", "memory", "speed here", "next"]
    assert [line[:15].strip() for line in lines] == topics
    assert "OVERFLOWS on 19 tokens" in lines[1]


def of_diffusers(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", "_diffusers_version": "0.38.0"}))
    return folder


def without(name: str, write: Any) -> Any:
    def written(folder: Path) -> Path:
        for path in write(folder).glob(name):
            path.unlink()
        return folder

    return written


def a_file(name: str) -> Any:
    def written(folder: Path) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(b"GGUF")
        return folder / name

    return written


# what writes the folder, and what is said of it
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (lambda folder: folder, "is no checkpoint folder; it must hold"),
    "a file": (a_file("lit_model.pth"), "is a file; a checkpoint is a folder. Pass the one it lies in"),
    "GGUF": (a_file("model.gguf"), "is GGUF, for llama.cpp; upcast takes weights of 16 or 32 bits"),
    "a folder of GGUF": (lambda folder: a_file("a.gguf")(folder).parent, "is GGUF, for llama.cpp"),
    "Diffusers": (of_diffusers, "is of Diffusers; these commands run a model on text"),
    "images": (
        of_a_class("ViTModel", "ViTConfig", {"hidden_size": 32, "num_attention_heads": 4}),
        "which reads no text",
    ),
    "no tokenizer": (without("tokenizer*", transformers_folder), "has no tokenizer"),
    "no tokenizer, LitGPT": (without("tokenizer*", FOLDERS["litgpt"][0]), "has no tokenizer"),
    "no weights": (without("*.safetensors", transformers_folder), "from_pretrained has to load the folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_checked_is_said_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, said = REFUSED[name]
    folder = write(tmp_path / "model")
    capsys.readouterr()
    assert main(["check", str(folder)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]

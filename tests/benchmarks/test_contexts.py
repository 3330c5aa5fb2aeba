"""The suite of long prompts: what it runs, what it prints, and one whole run of a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config

from benchmarks import run
from benchmarks.harness import readme
from benchmarks.harness.job import Job, prompt_of
from benchmarks.suites import contexts
from benchmarks.suites.contexts import Sample

TINY = {"block_size": 300, "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "vocab_size": 64}
LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False}
JOB = Job("upcast", Path(), Path(), None, (1,), (2,), ((3, 4, 5), (6, 7)))


@pytest.mark.parametrize(("length", "tokens"), [(2, (3, 4)), (5, (3, 4, 5, 6, 7)), (7, (3, 4, 5, 6, 7, 3, 4))])
def test_a_prompt_is_the_text_over_again(length: int, tokens: tuple[int, ...]) -> None:
    assert prompt_of(JOB, length) == tokens


def test_the_table_has_medians() -> None:
    samples = [Sample(2.0, 0.010), Sample(1.0, 0.030), Sample(4.0, 0.020)]
    rows = contexts.table({"float32": {512: samples}, "upcast": {512: samples[1:2]}, "OpenVINO": {}})
    assert rows == [
        ["", "prefill of 512", "decode after 512"],
        ["float32", "256 tok/s", "20.0 ms"],
        ["upcast", "512 tok/s", "30.0 ms"],
        ["OpenVINO", "-", "-"],
    ]


def tiny(folder: Path, **options: int) -> Path:
    config = Config(name="tiny", **{**TINY, **LLAMA, **options})
    torch.manual_seed(0)
    torch.save(GPT(config).half().state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(contexts.peers, "available", lambda config: ([], ["a peer is not installed"]))
    options = [
        "--checkpoint",
        str(tiny(tmp_path)),
        "--output",
        str(tmp_path / "out"),
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    assert run.main([*options, "--suite", "contexts", "--quick"]) == 0
    printed, errors = capfd.readouterr()
    assert "a peer is not installed" in errors
    assert "prefill of 256" in printed
    content = json.loads(next((tmp_path / "out").glob("*-contexts.json")).read_text())
    assert contexts.samples_of(content)["upcast"][64][0].prefill > 0
    section = readme.contexts_section(content)
    assert "| **upcast-packed** | " in section
    assert f"{content['threads']} threads" in section
    assert set(content["samples"]) == {"float32", "upcast", "upcast-packed"}
    assert {length for each in content["samples"].values() for length in each} == {"64", "256"}
    assert all(sample["decode"] > 0 for each in content["samples"].values() for of in each.values() for sample in of)


def test_a_model_that_takes_no_such_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny(tmp_path, block_size=60))
    assert run.main(["--checkpoint", folder, "--suite", "contexts", "--quick"]) == 1
    assert "takes 60 tokens, the shortest prompt here has 64" in capsys.readouterr().err

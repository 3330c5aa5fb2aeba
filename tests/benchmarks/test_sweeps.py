"""The suites of long prompts and of batches: what they run, what they print, and whole runs of a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config

from benchmarks import run
from benchmarks.harness import readme, sweep
from benchmarks.harness.job import Job, prompt_of, prompts_of
from benchmarks.harness.sweep import Sample
from benchmarks.harness.transformers_worker import padded
from benchmarks.suites import batches, contexts

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


def test_rows_of_a_batch_begin_later_and_some_are_padded_on_the_left() -> None:
    long = Job("upcast", Path(), Path(), None, (1,), (2,), (tuple(range(1, 90)),))
    assert [(row[0], row[-1]) for row in prompts_of(long, 3)] == [(1, 32), (2, 33), (3, 34)]
    ids, mask = padded(long, 3)
    assert mask.sum(1).tolist() == [32, 31, 30]
    assert ids[:, :3].tolist() == [[1, 2, 3], [0, 3, 4], [0, 0, 5]]
    assert mask[:, -1].all()


def test_tokens_a_second_are_those_of_all_sequences() -> None:
    rows = batches.table({"float32": {1: [Sample(1.0, 0.1)], 4: [Sample(1.0, 0.2)]}})
    assert rows == [["tokens a second", "1 at once", "4 at once"], ["float32", "10", "20"]]


def tiny(folder: Path, **options: Any) -> Path:
    config = Config(name="tiny", **{**TINY, **LLAMA, **options})
    torch.manual_seed(0)
    torch.save(GPT(config).half().state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


@pytest.mark.slow
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
    assert sweep.samples_of(content)["upcast"][64][0].prefill > 0
    section = readme.sweep_section(content)
    assert "| **upcast-packed** | " in section
    assert f"{content['threads']} threads" in section
    assert set(content["samples"]) == {"float32", "upcast", "upcast-packed"}
    assert {length for each in content["samples"].values() for length in each} == {"64", "256"}
    assert all(sample["decode"] > 0 for each in content["samples"].values() for of in each.values() for sample in of)


@pytest.mark.slow
def test_a_whole_run_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches.llamacpp, "why_not", lambda config: "not installed")
    options = ["--output", str(tmp_path), "--rounds", "1", "--threads", "1"]
    folder = tiny(tmp_path, rotary_percentage=1.0, parallel_residual=False)
    assert run.main(["--checkpoint", str(folder), *options, "--suite", "batches", "--quick"]) == 0
    content = json.loads(next(tmp_path.glob("*-batches.json")).read_text())
    assert set(content["samples"]) == {*batches.VARIANTS, *batches.TRANSFORMERS}
    assert all(sample["decode"] > 0 for each in content["samples"].values() for of in each.values() for sample in of)
    assert "| **upcast, Transformers** | " in readme.sweep_section(content)


TOO_SHORT = {
    "contexts": (60, "takes 60 tokens, the shortest prompt here has 64"),
    "batches": (30, "takes 30 tokens, a sequence here has 36"),
}


@pytest.mark.parametrize("suite", TOO_SHORT)
def test_a_model_that_takes_no_such_prompt(suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size, said = TOO_SHORT[suite]
    folder = str(tiny(tmp_path, block_size=size))
    assert run.main(["--checkpoint", folder, "--suite", suite, "--quick"]) == 1
    assert said in capsys.readouterr().err

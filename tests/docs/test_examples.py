"""The examples run, in short form, on a tiny checkpoint."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import serving
from tests.conftest import Run
from tests.docs import stand_ins
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"
VARIABLES = {"OMP_NUM_THREADS": "1"}
QUESTION = "What do llamas eat?"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    stand_ins.write_llama(folder / "llama")
    write_checkpoint(folder / "pythia", small_config("pythia-160m"))
    return folder


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run Python with these arguments, which must succeed."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **VARIABLES},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run an example in this process, which has imported the libraries already; return what it printed."""

    def run_here(example: str, *arguments: object) -> Any:
        monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning's, which sets it
        capsys.readouterr()
        code: object = 0
        try:
            runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        except SystemExit as end:
            code = end.code
        assert not code
        return capsys.readouterr()

    return run_here


def test_every_example_has_its_test_and_says_how_it_is_run() -> None:
    tests = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in path.read_text("utf-8").split('"""')[1]
        assert f'"{path.name}"' in tests


def test_inference(models: Path, tmp_path: Path, here: Callable[..., Any]) -> None:
    answers = {}
    for mode in ([], ["--float32"]):
        output = here("inference.py", "--model", models / "llama", "--prompt", QUESTION, "--tokens", "8", *mode)
        assert ("upcast: LlamaForCausalLM " in output.err) is not bool(mode)
        answers[bool(mode)] = output.out.splitlines()[0]
    assert answers[True] == answers[False]
    chat = shutil.copytree(models / "llama", tmp_path / "chat")  # its template asks for the answer to another text
    (chat / "chat_template.jinja").write_text("{{ messages[0].content[::-1] }}")
    asked, told = (
        here("inference.py", "--model", folder, "--prompt", prompt, "--tokens", "8").out.splitlines()[0]
        for folder, prompt in ((chat, QUESTION), (models / "llama", QUESTION[::-1]))
    )
    assert asked == told != answers[False]


@pytest.mark.slow
def test_distributed(models: Path, here: Callable[..., Any]) -> None:
    arguments = [models / "pythia", "--prompt", QUESTION, "--tokens", "8"]
    alone = here("distributed.py", *arguments)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = run(*start, EXAMPLES / "distributed.py", *arguments)
    assert both.stdout == alone.out
    sizes = [float(size) for size in re.findall(r"rank \d of 2: ([\d.]+) MB", both.stderr)]
    assert len(sizes) == 2
    assert max(sizes) < float(re.findall(r"rank 0 of 1: ([\d.]+) MB", alone.err)[0])


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*many workers", "ignore:.*in eval mode")
def test_lightning_loop(here: Callable[..., Any]) -> None:
    pytest.importorskip("lightning")
    losses = {}
    for mode in ([], ["--float32"]):
        output = here("lightning_loop.py", "--steps", "30", *mode)
        assert ("upcast: LlamaModel " in output.err) is not bool(mode)
        assert ("headroom/least" in output.out) is not bool(mode)
        losses[bool(mode)] = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output.out)]
    assert len(losses[False]) == 30
    assert sum(losses[False][-5:]) < sum(losses[False][:5])
    assert losses[False] == pytest.approx(losses[True], abs=2e-3)  # the base of --float32 is not rounded


def test_serve_transformers(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    port = serving.free_port()
    example = [str(EXAMPLES / "serve_transformers.py"), "--model", str(models / "llama"), "--port", str(port)]
    with serving.serve(example, port, tmp_path / "log", VARIABLES) as server:
        asked = {"prompt": QUESTION, "max_tokens": 8}
        first, second = (server.ask("/v1/completions", asked) for _ in range(2))
        drawn = [server.ask("/v1/completions", {**asked, "temperature": 1.0, "seed": 3}) for _ in range(2)]
        chat = server.ask(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
        )
        with pytest.raises(urllib.request.HTTPError) as refused:
            server.ask("/v1/completions", {"prompt": QUESTION, "max_tokens": 0})
        assert "upcast: LlamaForCausalLM " in server.said()
    assert _text(first) == _text(second) != _text(drawn[0]) == _text(drawn[1])
    assert first["usage"] == {"prompt_tokens": len(QUESTION), "completion_tokens": 8, "total_tokens": len(QUESTION) + 8}
    assert chat["choices"][0]["message"]["role"] == "assistant"
    refused.value.close()
    assert refused.value.code == 422


def _text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


@pytest.mark.slow
def test_serve_litgpt(tmp_path: Path) -> None:
    pytest.importorskip("litserve")
    pytest.importorskip("jinja2")
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("SmolLM2-135M-Instruct", block_size=512))
    options = ["--port", serving.free_port(), "--tokens", "8", "--ask", QUESTION]
    result = run(EXAMPLES / "serve_litgpt.py", folder, *options)
    assert "upcast: GPT " in result.stdout + result.stderr
    assert "\n" in result.stdout  # what an untrained model answers may be blank


def test_finetune_lora(python_in: Run, tmp_path: Path) -> None:
    from litgpt.prompts import Alpaca, save_prompt_style

    base = write_checkpoint(tmp_path / "base", small_config("SmolLM2-135M-Instruct", block_size=512))
    save_prompt_style(Alpaca(), base)
    curves = {}
    for mode in ("--float32", None):
        output = tmp_path / (mode or "patched")
        short = ["--checkpoint", base, "--steps", "4", "--batch", "2", "--answer-tokens", "3", "--output", output]
        options = [*short, *([mode] if mode else [])]
        result = python_in(tmp_path, EXAMPLES / "finetune_lora.py", *options, OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("before:") == result.stdout.count("after:") == 2
        assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert all("lora_" in name for name in torch.load(output / "lora.pth", weights_only=True))
        assert ("upcast: GPT " in result.stderr) is (mode is None)
        curves[mode] = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]
    assert len(curves[None]) == 4
    assert curves[None] == pytest.approx(curves["--float32"], abs=1.1e-4)  # they are printed with four digits

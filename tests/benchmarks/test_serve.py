"""litgpt serve under UPCAST=1, by real HTTP requests: plain, streaming and OpenAI-style, and several workers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import serving
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litserve")
pytestmark = pytest.mark.slow  # seconds for each server to come up

PROMPTS = ["What do llamas eat?", "And how much?"]
MESSAGES = [{"role": "user", "content": "What do llamas eat?"}]
VARIABLES = {**serving.UPCAST_ON, "OMP_NUM_THREADS": "1"}  # a tiny model gains nothing from a second thread
OPTIONS = ["--top_k", "1", "--max_new_tokens", "16", "--accelerator", "cpu", "--timeout", "300"]

WANTED = """
import json, sys
from litgpt import LLM
llm = LLM.load(sys.argv[1], distribute=None)
llm.distribute(accelerator="cpu", precision="32-true")
print(json.dumps([llm.generate(prompt, top_k=1, max_new_tokens=16) for prompt in json.loads(sys.argv[2])]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config("SmolLM2-135M-Instruct", block_size=512)
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint", config)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[str]:
    """Plain LitGPT's answers in float32 to PROMPTS, and to MESSAGES as the server's template renders them."""
    prompts = [*PROMPTS, f"user: {MESSAGES[0]['content']}\nAssistant: "]
    result = subprocess.run(
        [sys.executable, "-c", WANTED, str(folder), json.dumps(prompts)], capture_output=True, text=True, check=True
    )
    answers: list[str] = json.loads(result.stdout.splitlines()[-1])
    assert all(answers)
    assert "upcast" not in result.stderr
    return answers


def litgpt_serve(folder: Path, tmp_path: Path, *options: str) -> Any:
    port = serving.free_port()
    arguments = ["-m", "litgpt", "serve", str(folder), "--port", str(port), *OPTIONS, *options]
    return serving.serve(arguments, port, tmp_path / "log", VARIABLES)


def test_plain_requests(folder: Path, wanted: list[str], tmp_path: Path) -> None:
    with litgpt_serve(folder, tmp_path) as server:
        answers = [server.ask("/predict", {"prompt": prompt})["output"] for prompt in PROMPTS]
        assert server.said().count("upcast: GPT ") == 1
        assert len(server.models(folder)) == 1  # mapped: the file is in its address space
    assert answers == wanted[:2]


def test_streaming(folder: Path, wanted: list[str], tmp_path: Path) -> None:
    with litgpt_serve(folder, tmp_path, "--stream", "true") as server:
        pieces = [json.loads(line)["output"] for line in server.stream("/predict", {"prompt": PROMPTS[0]})]
        assert server.said().count("upcast: GPT ") == 1
    assert len(pieces) > 3
    assert "".join(pieces) == wanted[0]


def test_the_openai_way(folder: Path, wanted: list[str], tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    content = {"model": "any", "messages": MESSAGES}
    with litgpt_serve(folder, tmp_path, "--openai_spec", "true") as server:
        answer = server.ask("/v1/chat/completions", content)["choices"][0]["message"]["content"]
        lines = list(server.stream("/v1/chat/completions", {**content, "stream": True}))
        assert server.said().count("upcast: GPT ") == 1
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    assert answer == wanted[2]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == wanted[2]


def test_workers_share_the_weights(tmp_path: Path) -> None:
    sizes = {
        "block_size": 512,
        "n_layer": 8,
        "n_embd": 512,
        "padded_vocab_size": 8192,
        "vocab_size": 8192,
        "intermediate_size": 2048,
    }
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("SmolLM2-135M-Instruct", **sizes))
    weights = sum(t.nbytes for t in torch.load(folder / "lit_model.pth", mmap=True).values())
    script, port = tmp_path / "workers.py", serving.free_port()
    script.write_text(serving.WORKERS)
    with serving.serve([str(script), str(folder), str(port), "2"], port, tmp_path / "log", VARIABLES) as server:
        for _ in range(4):
            server.ask("/predict", {"prompt": PROMPTS[0]})
        found = server.models(folder)
        assert server.said().count("upcast: GPT ") == 2
    assert len(found) == 2
    assert sum(memory.checkpoint_pss for memory in found) < 1.05 * weights
    assert all(memory.checkpoint_rss > 0.9 * weights for memory in found)


# --- the benchmark's suite --------------------------------------------------------------------------------------------


def test_a_whole_run_of_the_serve_suite(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from benchmarks import run

    assert run.main(["--suite", "serve", "--quick", "--checkpoint", str(folder), "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2nd process adds" in text
    assert "from import to the first token: upcast " in text
    (path,) = tmp_path.glob("*-serve.json")
    variants = json.loads(path.read_text())["variants"]
    assert set(variants) == {"float32", "upcast"}
    for found in variants.values():
        assert len(found["request"]) == len(found["first_token"]) == 4
        assert all(value > 0 for value in found["figures"].values() if value is not None)
    assert variants["upcast"]["weight_bytes"] < 0.6 * variants["float32"]["weight_bytes"]

"""llama.cpp as the benchmark's peer: the GGUF file holds the same weights, and its logits are the same."""

import re
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT

from benchmarks import run
from benchmarks.models import smollm2
from benchmarks.peers import llamacpp
from tests.conftest import relative_error

SIZES = {"block_size": 256, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "padded_vocab_size": 96}
TINY = {**SIZES, "vocab_size": 96, "intermediate_size": 128, "head_size": 16}
LLAMA = "SmolLM2-135M-Instruct"
# Another head width than the embedding's share, experts narrower than an MLP.
MODELS: dict[str, dict[str, Any]] = {
    LLAMA: TINY,
    "Mixtral-8x7B-v0.1": TINY,
    "Qwen3-30B-A3B": {**TINY, "head_size": 32, "n_expert": 8, "n_expert_per_token": 3, "moe_intermediate_size": 48},
}
REFUSED = dict.fromkeys(("pythia-160m", "Gemma-2-2b", "Qwen3-0.6B"), "not of an architecture")


def tiny(name: str = LLAMA) -> tuple[Config, dict[str, torch.Tensor]]:
    config = Config.from_name(name, **MODELS[name])
    torch.manual_seed(0)
    state = GPT(config).state_dict()  # with numbers that bfloat16 and float16 have: neither's small ones
    return config, {name: torch.where(t.abs() < 2**-14, 0, t).bfloat16().half() for name, t in state.items()}


def write(path: Path, name: str = LLAMA) -> tuple[Config, dict[str, torch.Tensor]]:
    config, state = tiny(name)
    llamacpp.write_gguf(state, config, config.norm_eps, path)
    return config, state


def test_the_file_holds_the_same_weights(tmp_path: Path) -> None:
    config, state = write(tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert {kinds[name] for name in kinds if "norm" not in name} == {gguf.GGMLQuantizationType.F16}
    back = smollm2.convert_weights(reader, config)
    for name, tensor in back.items():
        if name != "lm_head.weight":  # that reader takes tied weights only
            assert torch.equal(tensor, state[name]), name
    head = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    assert torch.equal(torch.from_numpy(head.data.copy()), state["lm_head.weight"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_litgpt_s(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is an optional peer")
    config, state = write(tmp_path / "model.gguf", name)
    model: Any = GPT(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    tokens = torch.randint(96, (40,), generator=torch.Generator().manual_seed(1))
    peer = llamacpp.Model(tmp_path / "model.gguf", threads=2, kv_cache="float32")
    with torch.inference_mode():
        expected = model(tokens[None])[0]
    assert relative_error(peer.run(tokens.tolist(), all_logits=True), expected) < 2e-3
    peer.reset()
    peer.run(tokens[:30].tolist())
    assert relative_error(peer.run(tokens[30:].tolist()), expected[-1:]) < 2e-3
    peer.close()
    together = llamacpp.Model(tmp_path / "model.gguf", threads=2, kv_cache="float32", context=512, sequences=2)
    halves = tokens.view(2, 20)
    with torch.inference_mode():
        expected = model(halves)
    for part in (slice(0, 19), slice(19, 20)):
        got = together.run_together(halves[:, part].tolist())
        assert relative_error(got, expected[:, part][:, -1]) < 2e-3
    together.close()


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", object())
    assert REFUSED[name] in str(llamacpp.why_not(Config.from_name(name)))
    assert [llamacpp.why_not(tiny(each)[0]) for each in MODELS] == [None] * len(MODELS)


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("llama_cpp", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as ending:
        run.main(["--model", "pythia-14m", "--peers"])
    assert ending.value.code == 2
    found = re.search("--peers: (.*); (.*); (.*)", capsys.readouterr().err.replace("\n", " "))
    assert found
    assert "llama-cpp-python is not installed; `pip install llama-cpp-python`" in found[0]
    assert "openvino is not installed; `pip install openvino`" in found[0]

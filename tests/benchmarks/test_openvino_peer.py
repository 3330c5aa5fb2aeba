"""OpenVINO as the benchmark's peer: what it computes is LitGPT's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt import GPT
from litgpt.config import Config

from benchmarks.peers import openvino as openvino_peer
from benchmarks.peers import registry as peers
from tests.benchmarks.test_llamacpp import tiny
from tests.conftest import relative_error


def expected(tokens: torch.Tensor) -> tuple[torch.Tensor, Config, dict[str, torch.Tensor]]:
    config, state = tiny()
    model: Any = GPT(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.inference_mode():
        return model(tokens[None])[0], config, state


TOKENS = torch.randint(96, (40,), generator=torch.Generator().manual_seed(1))


def test_the_decoder_is_litgpt_s_model() -> None:
    want, config, state = expected(TOKENS)
    decoder = openvino_peer.Decoder(state, config, config.norm_eps).eval()
    past = [torch.zeros(1, config.n_query_groups, 0, config.head_size) for _ in range(2 * config.n_layer)]
    with torch.inference_mode():
        first = decoder(TOKENS[None, :30], torch.arange(30), torch.arange(30), *past)
        last = decoder(TOKENS[None, 30:], torch.arange(30, 40), torch.tensor([9]), *first[1:])
    assert relative_error(first[0], want[:30]) < 1e-6
    assert relative_error(last[0], want[-1:]) < 1e-6


def test_logits_are_litgpt_s(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is an optional peer")
    want, config, state = expected(TOKENS)
    openvino_peer.write(state, config, config.norm_eps, tmp_path / "model.xml")
    peer = openvino_peer.Model(tmp_path / "model.xml", threads=1, kv_cache="float32")
    assert relative_error(peer.run(TOKENS.tolist(), all_logits=True), want) < 2e-3
    peer.reset()
    peer.run(TOKENS[:30].tolist())
    assert relative_error(peer.run(TOKENS[30:].tolist()), want[-1:]) < 2e-3
    peer.close()


def test_only_plain_llamas_have_peers() -> None:
    found, missing = peers.available(Config.from_name("pythia-14m"))
    assert found == []
    assert missing

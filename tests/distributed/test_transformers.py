"""Transformers models loaded with tp_plan="auto", patched on each rank, equal one patched process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import assert_patched, half_weights, relative_error
from tests.distributed.test_distributed import ROOT

transformers = pytest.importorskip("transformers")

LIMIT = 1e-5
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
COMMON = {**SIZES, "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None}
GROUPED = {**COMMON, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False}
MODELS = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "neox": ("GPTNeoXConfig", COMMON),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, found = tmp_path_factory.mktemp("transformers"), {}
    for name, (config, settings) in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings))
        model.generation_config.eos_token_id = None
        model.save_pretrained(home / name)
        found[name] = home / name
    return found


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Any]:
    found, ids = {}, torch.arange(1, 25).reshape(2, 12)
    for name, folder in folders.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        upcast.patch(model)
        assert_patched(model)
        with torch.inference_mode():
            text = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
            bytes_of = {key: weight.stored.nbytes for key, weight in half_weights(model).items()}
            found[name] = {"logits": model(ids).logits, "text": text, "bytes": bytes_of}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("door", ["patch", "UPCAST=1"])
def test_ranks_equal_one_process(
    door: str, ranks: int, folders: dict[str, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    door_open = {"UPCAST": "1"} if door == "UPCAST=1" else {}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*launcher, str(ROOT / "tests" / "transformers_worker.py"), str(tmp_path), *map(str, folders.values())],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **door_open},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name, want in alone.items():
        for rank in range(ranks):
            got = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert not got["float32"], name
            assert relative_error(got["logits"], want["logits"]) < LIMIT, name
            assert got["text"].tolist() == want["text"].tolist(), name
            divided = [key for key, size in got["bytes"].items() if size == want["bytes"][key] // ranks]
            assert any("mlp" in key for key in divided), name
            assert sum(got["bytes"].values()) < 0.85 * sum(want["bytes"].values()), name

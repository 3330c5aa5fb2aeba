"""The checkpoint folder of the story as each version writes it, its script as a program, what LitGPT alone says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.litgpt_checkpoints import small_config, write_checkpoint

ROOT = Path(__file__).parents[2]


def checkpoint(folder: Path) -> Path:
    """Write ``checkpoints/EleutherAI/pythia-160m``: seeded weights, with outliers that overflow float16 in block 2."""
    config = small_config("pythia-160m", n_embd=128, n_head=2, n_query_groups=2)

    def spoil(state: dict[str, torch.Tensor]) -> None:
        """One channel of the residual stream goes to 150,000, as those of real models go to tens of thousands."""
        state["transformer.h.2.mlp.fc.bias"][:] = 300.0
        state["transformer.h.2.mlp.proj.weight"][0] = 1.0

    return write_checkpoint(folder / "checkpoints/EleutherAI/pythia-160m", config, spoil=spoil)


def plain_logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Return (8, vocabulary) of plain LitGPT in ``dtype``."""
    from litgpt import GPT, Config

    model: Any = GPT(Config.from_file(folder / "model_config.yaml")).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in torch.load(folder / "lit_model.pth").items()})
    with torch.inference_mode():
        logits: torch.Tensor = model.to(dtype)(torch.arange(8)[None])[0]
    return logits


def run(script: str, folder: Path, variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run ``script`` in ``folder`` with exactly these UPCAST variables."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, "PYTHONPATH": str(ROOT), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

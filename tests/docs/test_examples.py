"""The examples run, in short form, on a tiny checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_finetune_lora(tmp_path: Path) -> None:
    from litgpt.prompts import Alpaca, save_prompt_style

    base = write_checkpoint(tmp_path / "base", small_config("SmolLM2-135M-Instruct", block_size=512))
    save_prompt_style(Alpaca(), base)
    curves = {}
    for mode in ("--float32", None):
        output = tmp_path / (mode or "patched")
        short = ["--checkpoint", base, "--steps", "4", "--batch", "2", "--answer-tokens", "3", "--output", output]
        result = subprocess.run(
            [sys.executable, EXAMPLES / "finetune_lora.py", *short, *([mode] if mode else [])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("before:") == result.stdout.count("after:") == 2
        assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert all("lora_" in name for name in torch.load(output / "lora.pth", weights_only=True))
        assert ("upcast: GPT " in result.stderr) is (mode is None)
        curves[mode] = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]
    assert len(curves[None]) == 4
    assert curves[None] == pytest.approx(curves["--float32"], abs=1.1e-4)  # they are printed with four digits

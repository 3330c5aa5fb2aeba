"""--suite ablation: which op classes a model needs in float32, measured at each scale of its residual stream.

The stress test multiplies the residual stream by a power of two that RMSNorm cancels: float32's logits do not change,
and float16 comes to its end. What is upcast alone, and what is dropped alone, shows which classes carry the model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT

import upcast
from benchmarks.harness.stress import stress, stress_eps, why_not
from benchmarks.harness.subject import Subject

SCALES = (1, 4)
WINDOW = 128  # tokens
EXTRA = ("norm+residual+linear",)


def run(subject: Subject, output: Path) -> int:
    """Print a table per scale, write them with a picture and the headroom's picture to ``output``; return 0."""
    output.mkdir(parents=True, exist_ok=True)
    tokens = torch.tensor(subject.prompt[:WINDOW])[None]
    scales = SCALES if why_not(Config.from_checkpoint(subject.checkpoint)) is None else SCALES[:1]
    content: dict[str, Any] = {"subject": subject.title, "weights": subject.weights, "text": subject.text}
    for scale in scales:
        model = load(subject.checkpoint, scale)
        name = f"{subject.title}-ablation-x{scale}"
        result = upcast.ablate(model, tokens, extra=EXTRA)
        diagnosis = upcast.diagnose(model, tokens)
        print(f"\nresidual stream x {scale}\n{result}\nculprit: {diagnosis.culprit or 'none'}")
        content[f"x{scale}"] = {**json.loads(result.to_json()), "culprit": str(diagnosis.culprit or "none")}
        print(result.plot(output / f"{name}.png"))
        print(diagnosis.plot(output / f"{subject.title}-headroom-x{scale}.png"))
    path = output / f"{subject.title}-ablation.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(path)
    return 0


def load(checkpoint: Path, scale: int) -> GPT:
    """Return the model of a checkpoint folder with its residual stream times ``scale``, as stored, in eval mode."""
    model = GPT(Config.from_checkpoint(checkpoint)).eval()
    weights = torch.load(checkpoint / "lit_model.pth", mmap=True)
    model.load_state_dict(stress(weights, scale) if scale > 1 else weights, assign=True)
    if scale > 1:
        stress_eps(model, scale)
    return model

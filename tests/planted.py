"""Planted faults: models in which exactly one known operation overflows float16, and nothing else comes near it.

Two kinds. An *inserted* fault wraps one module of the model: behind its result an operation of the class reaches
beyond 65504, and is then multiplied by zero, so that float32's result does not change. A *natural* one scales the
model's own weights.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.litgpt_checkpoints import small_config
from tests.transformers_models import FAMILIES, make
from upcast.policy.policy import CLASSES

IDS = torch.arange(1, 13)[None]
DEPTH = 6  # blocks of a model with a fault
LITGPT = ("pythia-14m", "Llama-3.2-1B", "Gemma-2-2b", "Qwen3-0.6B", "phi-2")
TRANSFORMERS = ("GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM", "FalconForCausalLM")


def _residual(x: Tensor, planted: "Planted") -> Tensor:
    a = torch.full_like(x, 45000.0)
    return a + a


def _activation(x: Tensor, planted: "Planted") -> Tensor:
    a = torch.full_like(x, 300.0)
    return a * a


def _norm(x: Tensor, planted: "Planted") -> Tensor:
    return torch.full_like(x, 300.0).pow(2)


def _softmax(x: Tensor, planted: "Planted") -> Tensor:
    return torch.exp(torch.full_like(x, 12.0))


def _scores(x: Tensor, planted: "Planted") -> Tensor:
    a = torch.full_like(x, 300.0).flatten(0, -2)
    return (a @ a.mT).amax()


def _linear(x: Tensor, planted: "Planted") -> Tensor:
    return planted.matrix(torch.full_like(x, 300.0))


OPERATIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "linear": _linear,
    "norm": _norm,
    "softmax": _softmax,
    "scores": _scores,
    "residual": _residual,
    "activation": _activation,
}


class Planted(nn.Module):
    """A module behind which an operation of one class overflows float16 and leaves no trace in float32."""

    def __init__(self, module: nn.Module, op_class: str, width: int) -> None:
        super().__init__()
        self.module, self.operation = module, OPERATIONS[op_class]
        if op_class == "linear":
            self.matrix = nn.Linear(width, width, bias=False)
            self.matrix.weight = nn.Parameter(torch.eye(width) * 300.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        return out + (self.operation(out, self) * 0.0).mean()


@dataclass(frozen=True)
class Fault:
    """A model with a fault, and where it is."""

    model: nn.Module
    op_class: str
    module: str


def build(family: str, seed: int, depth: int = 0) -> nn.Module:
    """Return a tiny seeded model of LitGPT or Transformers, with as many blocks as asked for (by default a few)."""
    torch.manual_seed(seed)
    if family in LITGPT:
        from litgpt import GPT

        return GPT(small_config(family, **({"n_layer": depth} if depth else {}))).eval()
    kind, config, sizes, _ = next(row for row in FAMILIES if row[0] == family)
    layers = "n_layer" if "n_layer" in sizes else "num_hidden_layers"
    model: nn.Module = make(kind, config, {**sizes, layers: depth or sizes[layers]})
    return model


def plant(seed: int) -> Fault:
    """Return the planted fault of this seed: class, family and depth follow from it."""
    chance = random.Random(seed)
    op_class = list(CLASSES)[seed % len(CLASSES)]
    family = chance.choice(LITGPT if seed // len(CLASSES) % 2 else TRANSFORMERS)
    model = build(family, seed, DEPTH)
    name = chance.choice(_inside(model, nn.Linear, "Conv1D"))
    if op_class in ("linear", "norm") and chance.random() < 0.5:
        natural = name if op_class == "linear" else chance.choice(_inside(model, nn.LayerNorm, "RMSNorm"))
        if _scaled(model, natural):
            return Fault(model, op_class, natural)
        model = build(family, seed, DEPTH)
    parent, _, leaf = name.rpartition(".")
    inner = model.get_submodule(name)
    width = getattr(inner, "out_features", None) or inner.weight.shape[1]
    setattr(model.get_submodule(parent), leaf, Planted(inner, op_class, width))
    return Fault(model, op_class, f"{name}.matrix" if op_class == "linear" else name)


def _inside(model: nn.Module, kind: type[nn.Module], name: str) -> list[str]:
    """Return the names of such modules inside the blocks."""
    found = [each for each, m in model.named_modules() if isinstance(m, kind) or type(m).__name__.endswith(name)]
    return [each for each in found if re.search(r"\.\d+\.", each)]


def _scaled(model: nn.Module, name: str) -> bool:
    """Scale one module's weights until its largest result is 100,000; False if float16 could not hold them."""
    layer = model.get_submodule(name)
    seen: list[float] = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(float(out.abs().max())))
    with torch.no_grad():
        model(IDS)
        while seen[-1] < 0.99e5:  # more than once where the weights are offsets
            for parameter in layer.parameters():
                parameter.mul_(1e5 / seen[-1])
            if max(float(p.abs().max()) for p in layer.parameters()) > 60000:
                break
            model(IDS)
    handle.remove()
    return seen[-1] > 0.99e5

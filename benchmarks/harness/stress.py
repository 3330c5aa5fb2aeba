"""The exact stress test: a model whose residual stream is scaled and whose logits must not change.

RMSNorm cancels a factor of its input. So multiplying everything that is added to the residual stream (the
embedding, every attention and MLP output projection) by c = 2^k, and the norms' eps by c^2, changes no bit of
the logits in float32, while the activations grow by c. Whatever breaks at some c has run out of range.
"""

import math
import re
from collections.abc import Mapping
from typing import TypeVar, overload

import torch
from litgpt.config import Config
from litgpt.model import RMSNorm

# What is added to the residual stream; lm_head reads the normalised stream and stays as it is.
SCALED = re.compile(r"transformer\.wte\.weight|transformer\.h\.\d+\.(attn|mlp)\.proj\.(weight|bias)")
# Norms that read the residual stream. norm_q and norm_k read projections of an already normalised input.
RESIDUAL_NORM = re.compile(r"transformer\.(ln_f|h\.\d+\.norm_[12])")

Model = TypeVar("Model", bound=torch.nn.Module)


def why_not(config: Config) -> str | None:
    """Return why the stress test is not exact for models of this `config`, or None where it is."""
    if config.norm_class_name != "RMSNorm":
        return f"{config.name} uses {config.norm_class_name}; only RMSNorm cancels a power of two exactly"
    if config.post_attention_norm or config.post_mlp_norm:
        return f"{config.name} normalises before the residual add, which cancels the scale too early"
    if config.mlp_class_name == "LLaMAMoE" or config.latent_attention:
        return f"{config.name} has experts or latent attention, whose output projections are not scaled here"
    return None


@overload
def stress(subject: Model, scale: int) -> Model: ...
@overload
def stress(subject: Mapping[str, torch.Tensor], scale: int) -> dict[str, torch.Tensor]: ...
def stress(
    subject: torch.nn.Module | Mapping[str, torch.Tensor], scale: int
) -> torch.nn.Module | dict[str, torch.Tensor]:
    """Scale the residual stream by `scale`, a power of two that keeps every weight inside its dtype's range.

    A model is changed in place (weights and eps) and returned; stress it before patching. Of a state dict a
    new one is returned, where `lm_head.weight` keeps its values even if it was one tensor with the embedding;
    the model it is loaded into needs `stress_eps` as well. Raises `ValueError` on any other scale.
    """
    if scale < 1 or not math.log2(scale).is_integer():
        raise ValueError(f"scale {scale}; only a power of two changes no bit. Use 4, 64, 1024, ...")
    if not isinstance(subject, torch.nn.Module):
        return {name: _scaled(name, tensor, scale) for name, tensor in subject.items()}
    parameters = dict(subject.named_parameters(remove_duplicate=False))
    scaled = {name: _scaled(name, parameter.detach(), scale) for name, parameter in parameters.items()}
    subject.load_state_dict(scaled, assign=True)
    stress_eps(subject, scale)
    return subject


def stress_eps(model: torch.nn.Module, scale: int) -> None:
    """Multiply by scale^2 the eps of every RMSNorm in `model` that reads the residual stream."""
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and RESIDUAL_NORM.fullmatch(name):
            module.eps *= scale**2


def _scaled(name: str, tensor: torch.Tensor, scale: int) -> torch.Tensor:
    if not SCALED.fullmatch(name):
        return tensor
    scaled = tensor * scale
    if scaled.isinf().any():
        limit = torch.finfo(tensor.dtype).max
        raise ValueError(
            f"{name}: {tensor.abs().max().item():g} times {scale} exceeds {limit:g}, the range of "
            f"{tensor.dtype}; the test needs weights in range. Use a smaller scale."
        )
    return scaled

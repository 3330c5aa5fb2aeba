"""Every name in LitGPT's config, and its LoRA, adapter and latent-attention modules."""

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage_table.case import Case, Inputs, Missing
from tests.litgpt_checkpoints import small_config

GROUP = "LitGPT"
IDS = torch.arange(14).view(2, 7) * 9
FAST = ["pythia-160m", "falcon-40b", "Llama-3.2-1B", "Gemma-2-2b", "Gemma-3-1b-it"]
FAST += ["Mixtral-8x7B-v0.1", "Qwen3-0.6B", "OLMo-2-1124-7B"]

LORA = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}
LATENT = {
    "latent_attention": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
}
MODULES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("LoRA on pythia-160m", "lora", "pythia-160m", {"lora_r": 4, **LORA}),
    ("LoRA on Mixtral-8x7B-v0.1", "lora", "Mixtral-8x7B-v0.1", {"lora_r": 4, **LORA}),
    ("LoRA on Gemma-2-2b", "lora", "Gemma-2-2b", {"lora_r": 4, **LORA}),
    ("adapter on pythia-160m", "adapter", "pythia-160m", {"adapter_start_layer": 1}),
    ("adapter on Llama-2-7b-hf", "adapter", "Llama-2-7b-hf", {"adapter_start_layer": 1}),
    ("adapter_v2 on pythia-160m", "adapter_v2", "pythia-160m", {"adapter_start_layer": 1}),
    ("adapter_v2 on Mixtral-8x7B-v0.1", "adapter_v2", "Mixtral-8x7B-v0.1", {"adapter_start_layer": 1}),
    ("latent attention (MLA)", "model", "Llama-2-7b-hf", LATENT),
]
"""Row -> LitGPT's module, its config, and what is added to that."""


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each name, then one for each kind of module."""
    from litgpt.config import name_to_config

    for name in name_to_config:
        build = functools.partial(_build, "model", name, {})
        yield Case(GROUP, name, build, _inputs, generate, fast=name in FAST)
    for row, module, name, changes in MODULES:
        yield Case(GROUP, row, functools.partial(_build, module, name, changes), _inputs, generate, fast=True)


def _build(module: str, name: str, changes: dict[str, Any]) -> nn.Module:
    home = importlib.import_module(f"litgpt.{module}")
    config_class = importlib.import_module("litgpt" if module == "model" else f"litgpt.{module}").Config
    small = small_config(name)
    model: nn.Module = home.GPT(config_class(**{**_settings(small), **changes}))
    return model


def _settings(config: Any) -> dict[str, Any]:
    from dataclasses import fields

    return {field.name: getattr(config, field.name) for field in fields(config) if field.init}


def _inputs(_: nn.Module) -> Inputs:
    return {"idx": IDS}


def generate(model: Any, inputs: Inputs) -> list[Tensor]:
    """Return the logits of a prompt and of three single tokens after it, with LitGPT's KV cache."""
    model.set_kv_cache(batch_size=2, max_seq_length=16)
    logits = [model(IDS, torch.arange(7))]
    logits += [model(IDS[:, t : t + 1], torch.tensor([7 + t]), input_pos_maxp1=8 + t) for t in range(3)]
    model.clear_kv_cache()
    return logits

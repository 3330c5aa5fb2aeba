"""LitGPT's checkpoint folders as ones of Transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from litgpt import Config
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama, copy_weights_qwen_3
from safetensors.torch import save_file

from benchmarks.models.architecture import LLAMA, MIXTRAL, QWEN3_MOE, architecture

_CLASSES = {LLAMA: "LlamaForCausalLM", MIXTRAL: "MixtralForCausalLM", QWEN3_MOE: "Qwen3MoeForCausalLM"}


def write_transformers(source: Path, folder: Path) -> Path:
    """Write LitGPT's checkpoint in ``source`` as a float16 one of Transformers; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Config.from_file(source / "model_config.yaml")
    kind = architecture(settings)
    copy_weights = copy_weights_qwen_3 if kind == QWEN3_MOE else copy_weights_llama
    state: dict[str, torch.Tensor] = {}
    copy_weights(settings, state, torch.load(source / "lit_model.pth", mmap=True), untie_weights=kind == LLAMA)
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(settings, kind), indent=1))
    return folder


def _config(settings: Any, kind: Any) -> dict[str, Any]:
    config = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "hidden_size": settings.n_embd,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.n_layer,
        "num_attention_heads": settings.n_head,
        "num_key_value_heads": settings.n_query_groups,
        "head_dim": settings.head_size,
        "vocab_size": settings.padded_vocab_size,
        "max_position_embeddings": settings.block_size,
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": float(settings.rope_base),
        "tie_word_embeddings": kind == LLAMA,
        "dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if kind != LLAMA:
        config |= {"num_experts_per_tok": settings.n_expert_per_token}
    if kind == MIXTRAL:
        config |= {"num_local_experts": settings.n_expert}
    if kind == QWEN3_MOE:
        config |= {"num_experts": settings.n_expert, "moe_intermediate_size": settings.moe_intermediate_size}
        config |= {"norm_topk_prob": True}
    return config

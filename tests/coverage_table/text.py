"""Every text decoder of Transformers: MODEL_FOR_CAUSAL_LM_MAPPING."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from tests.coverage_table.case import Case, Missing, greedy
from tests.coverage_table.shrink import Whole, tiny

GROUP = "Transformers text decoders"
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": Whole(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        "ffn_config": Whole(hidden_size=32, ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "musicgen": {"num_codebooks": 2},
    "musicgen_melody": {"num_codebooks": 2},
    "qwen3_5": LINEAR,
    "qwen3_5_moe": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True},
}
"""Model type -> what the sizes in `shrink` alone cannot say about its structure."""

CAUSES = {
    "gemma3n": "its vision tower is a timm model, and timm is no dependency; its text model is gemma3n_text",
}

STRUCTURE = {
    "granitemoehybrid": {"layer_types": ["mamba"] * 31 + ["attention"]},
    "lfm2_moe": {"layer_types": ["conv"] * 31 + ["full_attention"]},
}
"""Model type -> what its default config lacks to be built at its published size."""

NO_CACHE = {"blt", "cpmant"}  # their own generate fails with a cache, in plain float32 too
NO_GENERATE = {"musicgen", "musicgen_melody"}  # their generate wants the text encoder of the composed model

FAST = ["gpt2", "gpt_neox", "llama", "qwen3", "gemma3_text", "mixtral", "deepseek_v3", "gpt_oss"]
FAST += ["falcon", "bloom", "mamba", "minimax_m2", "phi"]


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each entry of the mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind, class_name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind in CAUSES:
            yield Missing(GROUP, kind, CAUSES[kind])
            continue
        build = functools.partial(_build, class_name, OVERRIDES.get(kind, {}))
        full = functools.partial(_full, class_name, STRUCTURE.get(kind, {}))
        generate = None if kind in NO_GENERATE else greedy(use_cache=kind not in NO_CACHE)
        yield Case(GROUP, f"{kind} ({class_name})", build, generate=generate, full=full, fast=kind in FAST)


def _build(name: str, overrides: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    model: nn.Module = model_class(tiny(model_class.config_class, **overrides))
    return model


def _full(name: str, structure: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class(**structure))
    return model

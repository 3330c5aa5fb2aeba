"""Tiny models of Transformers, a row for each kind of architecture, with inputs."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
IDS = torch.arange(3, 17).view(2, 7)
TOKENS = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
PIXELS = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
SOUND = {"input_features": torch.randn(1, 80, 64, generator=torch.Generator().manual_seed(0))}

# class, its config's class, sizes, inputs
FAMILIES: list[tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = [
    ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}, TOKENS),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, TOKENS),
    ("LlamaForCausalLM", "LlamaConfig", TEXT, TOKENS),
    ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}, TOKENS),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8}, TOKENS),
    ("MixtralForCausalLM", "MixtralConfig", {**TEXT, **MOE}, TOKENS),
    ("GptOssForCausalLM", "GptOssConfig", {**TEXT, **MOE, "head_dim": 8}, TOKENS),
    ("FalconForCausalLM", "FalconConfig", TEXT, TOKENS),
    ("BloomForCausalLM", "BloomConfig", {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}, TOKENS),
    ("MambaForCausalLM", "MambaConfig", {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}, TOKENS),
    ("BertModel", "BertConfig", TEXT, TOKENS),
    (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        BOTH,
    ),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**SEQ2SEQ, **HEADS, "vocab_size": 128, "max_source_positions": 32, "num_mel_bins": 80, "pad_token_id": 0},
        {**SOUND, "decoder_input_ids": IDS[:1]},
    ),
    ("ViTModel", "ViTConfig", {**TEXT, "image_size": 32, "patch_size": 8}, PIXELS),
]


def make(kind: str, config_kind: str, sizes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config_kind)(**sizes)).eval()


def first_output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        output = model(**inputs)
    return output[0] if "logits" not in output else output.logits

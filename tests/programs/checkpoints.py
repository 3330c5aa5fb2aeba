"""The float16 checkpoints that the programs load, and how they load them."""

from pathlib import Path
from typing import Any

import torch

from tests.litgpt_checkpoints import small_config, write_checkpoint, write_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
# folder -> class, config, changes to SIZES
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {}),
    "bert": ("BertModel", "BertConfig", {}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "vit": ("ViTModel", "ViTConfig", {"image_size": 16, "patch_size": 8}),
}


def write_transformers(folder: Path) -> Path:
    """Write every model of MODELS in float16, with a tokenizer of bytes."""
    import transformers

    for name, (kind, config, changes) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**{**SIZES, **changes}))
        _louder(model).half().save_pretrained(folder / name)
        write_tokenizer(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
    return folder


@torch.no_grad()
def _louder(model: torch.nn.Module) -> torch.nn.Module:
    """Make the weights large enough for different tokens to win: a model of 0.02s says one word for ever."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


LOADED: list[int] = []
"""For each model that a program loaded: how many of its weights are stored in float16."""


def write_lit(folder: Path) -> Path:
    """Write a LitGPT checkpoint in float16, and one in float32 of numbers that float16 has."""
    config = small_config("SmolLM2-135M-Instruct", block_size=256)
    write_checkpoint(folder / "lit", config)
    state = torch.load(write_checkpoint(folder / "lit32", config, torch.float32) / "lit_model.pth")
    torch.save({name: weight.half().float() for name, weight in state.items()}, folder / "lit32" / "lit_model.pth")
    return folder


def load(folder: Path, name: str = "llama", kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """Load as a program would that wants float32's digits."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder / name, dtype=torch.float32, **options)
    note(model)
    return model


def note(model: torch.nn.Module) -> None:
    """Remember how many of a loaded model's weights are stored in float16."""
    LOADED.append(sum(type(weight).__name__ == "HalfWeight" for weight in model.parameters()))


IDS = torch.tensor([[5, 17, 40, 8, 99, 120, 7, 33], [61, 4, 250, 77, 18, 9, 200, 140]])

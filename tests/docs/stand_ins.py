"""Small models under the names that pages use for the reader's own: what a page shows runs without a download."""

import json
from pathlib import Path

import torch

from tests.litgpt_checkpoints import small_config, write_checkpoint, write_tokenizer

CHECKPOINT = Path("checkpoints/EleutherAI/pythia-160m")
MODEL = Path("path/to/model")
UNET, PIPELINE = Path("path/to/unet"), Path("path/to/pipeline")

LLAMA = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def write(folder: Path) -> None:
    """Write all of them into ``folder``."""
    write_checkpoint(folder / CHECKPOINT, small_config("pythia-160m"))
    write_llama(folder / MODEL)
    write_unet(folder / UNET)
    write_pipeline(folder / PIPELINE)


def write_llama(folder: Path) -> None:
    """Write a Llama of Transformers in float16, with a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, **HEADS)).half().save_pretrained(folder)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))


def write_unet(folder: Path) -> None:
    """Write a UNet of Diffusers."""
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 1}
    UNet2DConditionModel(sample_size=8, **BLOCKS, **sizes).half().save_pretrained(folder)


def write_pipeline(folder: Path) -> None:
    """Write a pipeline of Diffusers that makes images out of noise."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    DDPMPipeline(UNet2DModel(sample_size=8, **blocks, **sizes), DDPMScheduler(4)).save_pretrained(folder)

"""Diffusers: denoisers and autoencoders, tiny."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.coverage_table.case import Case, Inputs, Missing, noise

GROUP = "Diffusers"
STEP = torch.tensor([3, 5])
BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1}
AUTOENCODER = {
    **BLOCKS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}

Table = list[tuple[str, dict[str, Any], Callable[[], Inputs]]]


def _table() -> Table:
    words, pooled = noise(2, 5, 32), noise(2, 32)
    picture, latents, video = noise(2, 3, 16, 16), noise(2, 4, 16, 16), noise(2, 4, 3, 8, 8)
    conditioned = {
        **BLOCKS,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
    }
    plain = {**BLOCKS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8}
    return [
        (
            "UNet2DConditionModel",
            {**conditioned, "sample_size": 16},
            lambda: {"sample": latents, "timestep": STEP, "encoder_hidden_states": words},
        ),
        (
            "UNet2DModel",
            {**plain, "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "sample_size": 16},
            lambda: {"sample": picture, "timestep": STEP},
        ),
        (
            "DiTTransformer2DModel",
            {**HEADS, "sample_size": 16, "num_embeds_ada_norm": 10},
            lambda: {"hidden_states": latents, "timestep": STEP, "class_labels": torch.tensor([1, 2])},
        ),
        (
            "FluxTransformer2DModel",
            {**HEADS, "in_channels": 4, "num_single_layers": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
            | {"axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
            lambda: {
                "hidden_states": noise(2, 9, 4),
                "encoder_hidden_states": words,
                "pooled_projections": pooled,
                "timestep": STEP / 10,
                "guidance": STEP / 2,
                "img_ids": noise(9, 3),
                "txt_ids": noise(5, 3),
            },
        ),
        (
            "SD3Transformer2DModel",
            {**HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 32}
            | {"caption_projection_dim": 32, "pooled_projection_dim": 32, "dual_attention_layers": (0,)}
            | {"qk_norm": "rms_norm"},
            lambda: {
                "hidden_states": latents,
                "encoder_hidden_states": words,
                "pooled_projections": pooled,
                "timestep": STEP,
            },
        ),
        (
            "WanTransformer3DModel",
            {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 64},
            lambda: {"hidden_states": video, "timestep": STEP, "encoder_hidden_states": words},
        ),
        (
            "PixArtTransformer2DModel",
            {**HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32}
            | {"caption_channels": 32, "use_additional_conditions": False},
            lambda: {
                "hidden_states": latents,
                "encoder_hidden_states": words,
                "timestep": STEP,
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
        ("AutoencoderKL", AUTOENCODER, lambda: {"sample": picture}),
        (
            "AutoencoderKLWan",
            {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
            lambda: {"sample": noise(1, 3, 5, 16, 16)},
        ),
        (
            "AutoencoderTiny",
            {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
            | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
            lambda: {"sample": picture},
        ),
        (
            "VQModel",
            {**AUTOENCODER, "num_vq_embeddings": 64},
            lambda: {"sample": picture},
        ),
    ]


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each class."""
    for name, settings, inputs in _table():
        yield Case(GROUP, name, _builder(name, settings), _constant(inputs), fast=name in FAST)


FAST = ("UNet2DConditionModel", "FluxTransformer2DModel", "AutoencoderKL")


def _builder(name: str, settings: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, name)(**settings)
        return model

    return build


def _constant(inputs: Callable[[], Inputs]) -> Callable[[nn.Module], Inputs]:
    return lambda _: inputs()


# --- HunyuanVideo-1.5, for `story` ------------------------------------------------------------------------------------


def hunyuan_transformer() -> nn.Module:
    """Return HunyuanVideo-1.5's denoiser with two blocks."""
    import diffusers

    model: nn.Module = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=(4, 4, 8),
        target_size=16,
    )
    return model


def video_inputs(_: nn.Module) -> Inputs:
    """Return noise, two texts and a picture for `hunyuan_transformer`."""
    return {
        "hidden_states": noise(1, 9, 2, 4, 4),
        "timestep": torch.tensor([7.0]),
        "encoder_hidden_states": noise(1, 5, 32),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "encoder_hidden_states_2": noise(1, 4, 32),
        "encoder_attention_mask_2": torch.ones(1, 4, dtype=torch.bool),
        "image_embeds": noise(1, 3, 32),
    }


def hunyuan_vae() -> nn.Module:
    """Return HunyuanVideo-1.5's autoencoder with few channels."""
    import diffusers

    model: nn.Module = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1, spatial_compression_ratio=8
    )
    return model


def video_latents(_: nn.Module) -> Inputs:
    """Return a short video for `hunyuan_vae`."""
    return {"sample": noise(1, 3, 5, 16, 16)}

"""The models that the story names, each by its own architecture, with pictures where it sees."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.coverage_table.case import IDS, Case, Inputs, Missing, greedy, noise
from tests.coverage_table.diffusion import hunyuan_transformer, hunyuan_vae, video_inputs, video_latents
from tests.coverage_table.shrink import tiny

GROUP = "Models of the story"
IMAGE = 100  # the token that stands for a picture


class SeeingQwen3(nn.Module):
    """A SigLIP2 tower, a resampling projection and a Qwen3 text model: how MiniCPM-V-4.5 is composed."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.vpm = transformers.Siglip2VisionModel(tiny(transformers.Siglip2VisionConfig))
        self.queries = nn.Parameter(torch.randn(4, 32))
        self.resampler = nn.MultiheadAttention(32, 4, batch_first=True)
        self.projection = nn.Parameter(torch.randn(32, 32) / 6)
        self.llm = transformers.Qwen3ForCausalLM(tiny(transformers.Qwen3Config))

    def forward(self, input_ids: torch.Tensor, **picture: torch.Tensor) -> Any:
        seen = self.vpm(**picture).last_hidden_state
        queries = self.queries.expand(len(seen), -1, -1)
        summary = self.resampler(queries, seen, seen)[0] @ self.projection
        text = self.llm.get_input_embeddings()(input_ids)
        return self.llm(inputs_embeds=torch.cat([summary, text], dim=1)).logits


def cases() -> Iterator[Case | Missing]:
    """Yield the rows in the story's order."""
    yield Case(
        GROUP,
        "ERNIE-4.5-VL-28B-A3B (Ernie4_5_VLMoeForConditionalGeneration)",
        lambda: _model("Ernie4_5_VLMoeForConditionalGeneration", _ernie()),
        _ernie_inputs,
        greedy(),
        lambda: _model("Ernie4_5_VLMoeForConditionalGeneration"),
        fast=True,
    )
    yield _text("Kimi-K2", "DeepseekV3ForCausalLM", num_key_value_heads=4, num_hidden_layers=3, first_k_dense_replace=1)
    yield _text("MiniMax-M2", "MiniMaxM2ForCausalLM")
    yield Case(GROUP, "HunyuanVideo-1.5 transformer", hunyuan_transformer, video_inputs, fast=True)
    yield Case(GROUP, "HunyuanVideo-1.5 VAE", hunyuan_vae, video_latents, fast=True)
    yield Case(GROUP, "MiniCPM-V-4.5 (Siglip2 and Qwen3)", SeeingQwen3, _picture, fast=True, note="composed as it is")
    yield _text("Spark-Formalizer-X1-7B", "Qwen2ForCausalLM", "the nearest public architecture of a 7B decoder")
    yield Case(
        GROUP,
        "GOT-OCR-2.0-hf (GotOcr2ForConditionalGeneration)",
        lambda: _model("GotOcr2ForConditionalGeneration", _got()),
        _got_inputs,
        greedy(),
        lambda: _model("GotOcr2ForConditionalGeneration"),
        fast=True,
    )


def _text(name: str, kind: str, note: str = "", **changes: Any) -> Case:
    def build() -> nn.Module:
        import transformers

        return _model(kind, tiny(getattr(transformers, kind).config_class, **changes))

    full = functools.partial(_model, kind)
    return Case(GROUP, f"{name} ({kind})", build, generate=greedy(), full=full, fast=True, note=note)


def _model(kind: str, config: Any = None) -> nn.Module:
    """Return an instance of a class of Transformers, at its published size unless a config says otherwise."""
    import transformers

    model_class = getattr(transformers, kind)
    model: nn.Module = model_class(config or model_class.config_class())
    return model


def _picture(_: nn.Module) -> Inputs:
    shapes = torch.tensor([[4, 4], [2, 8]])
    mask = torch.ones(2, 16, dtype=torch.int64)
    return {"input_ids": IDS, "pixel_values": noise(2, 16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _ernie() -> Any:
    import transformers

    tokens = {"image_token_id": IMAGE, "image_start_token_id": 101, "image_end_token_id": 102, "video_token_id": 103}
    text = {
        "moe_intermediate_size": [16, 8],
        "mlp_layer_types": ["dense", "sparse"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    }
    return tiny(
        transformers.Ernie4_5_VLMoeConfig,
        text_config=text,
        vision_config={"hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2},
        video_start_token_id=104,
        video_end_token_id=105,
        **tokens,
    )


def _ernie_inputs(_: nn.Module) -> Inputs:
    ids = torch.tensor([[3, 4, 101, *[IMAGE] * 4, 102, 7, 9]])
    kinds = (ids == IMAGE).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "moe_mm_token_type_ids": kinds,
        "pixel_values": noise(16, 3 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _got() -> Any:
    import transformers

    vision = {"output_channels": 16, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1], "image_size": 128}
    return tiny(
        transformers.GotOcr2Config,
        vision_config={**vision, "patch_size": 4},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )


def _got_inputs(_: nn.Module) -> Inputs:
    ids = torch.tensor([[3, 4, *[IMAGE] * 64, 7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(1, 3, 128, 128)}

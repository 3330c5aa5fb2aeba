"""Vision-language models with a picture: the vision tower runs, and the text is generated after what it saw."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.coverage_table.case import Case, Inputs, Missing, greedy, noise
from tests.coverage_table.shrink import Whole, tiny

GROUP = "Transformers vision-language, with a picture"
IMAGE = 100  # the token that stands for a part of a picture
TOKEN_NAMES = ("image_token_id", "image_token_index")

# --- pictures ---------------------------------------------------------------------------------------------------------


def square(config: Any) -> Inputs:
    """One picture of the size that the tower expects."""
    return {"pixel_values": noise(1, 3, *_size(config))}


def tiles(config: Any) -> Inputs:
    """One picture in two tiles."""
    return {"pixel_values": noise(1, 2, 3, *_size(config))}


def sized(config: Any) -> Inputs:
    """One picture that says how large it is."""
    return {**square(config), "image_sizes": torch.tensor([_size(config)])}


def sized_tiles(config: Any) -> Inputs:
    """One picture in two tiles and once as a whole, with its size."""
    height, width = _size(config)
    return {"pixel_values": noise(1, 3, 3, height, width), "image_sizes": torch.tensor([[height, 2 * width]])}


def patches(config: Any) -> Inputs:
    """One picture of four times four patches, flattened."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
    width = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {"pixel_values": noise(16, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def shaped(config: Any) -> Inputs:
    """One picture of four times four patches, with a mask and its shape."""
    mask = torch.ones(1, 16, dtype=torch.int64)
    pixels = noise(1, 16, 3 * config.vision_config.patch_size**2)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]])}


def stacked(config: Any) -> Inputs:
    """One picture of four times four patches, as small pictures (PaddleOCR-VL)."""
    vision = config.vision_config
    pixels = noise(16, 3, vision.patch_size, vision.patch_size)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


def merged(config: Any) -> Inputs:
    """One picture of four times four patches, none of them merged (VideoLLaMA 3)."""
    return {**patches(config), "image_merge_sizes": torch.tensor([1])}


def named(config: Any) -> Inputs:
    """One picture, told apart from videos by its name (Video-LLaVA)."""
    return {"pixel_values_images": square(config)["pixel_values"]}


def twice(config: Any) -> Inputs:
    """One picture for each of two towers (DeepSeek-VL hybrid)."""
    size = config.high_res_vision_config.image_size
    return {**square(config), "high_res_pixel_values": noise(1, 3, size, size)}


def _size(config: Any) -> tuple[int, int]:
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


# --- whole prompts, where no token stands for a part of the picture ---------------------------------------------------

PROMPT = torch.tensor([[3, 4, 7, 9, 11]])


def beside(model: Any) -> Inputs:
    """A picture beside the text."""
    return {"input_ids": PROMPT, **square(model.config)}


def crossed(model: Any) -> Inputs:
    """A picture of four tiles, seen through cross-attention (Mllama)."""
    seen = {"cross_attention_mask": torch.ones(1, PROMPT.shape[1], 1, 4, dtype=torch.int64)}
    shape = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.int64)}
    pixels = {"pixel_values": noise(1, 1, 4, 3, *_size(model.config))}
    return {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), **pixels, **seen, **shape}


def masked(model: Any) -> Inputs:
    """A picture, and which positions are its own (Kosmos-2)."""
    count = model.config.latent_query_num
    ids = torch.tensor([[3, 4, *[IMAGE] * count, 7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": ids == IMAGE} | {
        **square(model.config)
    }


def asked(model: Any) -> Inputs:
    """A picture, and a question for the transformer that looks at it (InstructBLIP)."""
    ids = torch.tensor([[*[IMAGE] * model.config.num_query_tokens, 3, 7, 9]])
    question = {"qformer_input_ids": PROMPT, "qformer_attention_mask": torch.ones_like(PROMPT)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **question, **square(model.config)}


def attended(model: Any) -> Inputs:
    """A picture, and which words see it (IDEFICS)."""
    pixels = noise(1, 1, 3, *_size(model.config))
    seen = torch.ones(1, PROMPT.shape[1], 1, dtype=torch.int64)
    both = {"pixel_values": pixels, "image_attention_mask": seen}
    return {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT), **both}


def rendered(model: Any) -> Inputs:
    """A page as patches that say where they stand (Pix2Struct)."""
    places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], dim=-1).float()
    page = torch.cat([places, noise(16, model.config.vision_config.patch_embed_hidden_size)], dim=-1)
    mask = torch.ones(1, 16, dtype=torch.int64)
    return {"flattened_patches": page.unsqueeze(0), "attention_mask": mask, "decoder_input_ids": PROMPT}


def written(model: Any) -> Inputs:
    """A page as patches, and which positions are its own (Kosmos-2.5)."""
    page = rendered(model)["flattened_patches"]
    ids = torch.tensor([[3, *[IMAGE] * model.config.latent_query_num, 7, 9]])
    seen = {"image_embeds_position_mask": (ids == IMAGE).long(), "flattened_patches": page}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def laid_out(model: Any) -> Inputs:
    """A page, and where each word stands on it (UDOP)."""
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.2]] * PROMPT.shape[1]])
    return {"input_ids": PROMPT, "bbox": boxes, "decoder_input_ids": PROMPT, **square(model.config)}


def encoded(model: Any) -> Inputs:
    """A picture in the encoder's prompt (T5Gemma 2)."""
    prompt = _prompt(lambda config: square(config.encoder), model)
    return {**prompt, "decoder_input_ids": PROMPT}


def coded(model: Any) -> Inputs:
    """A picture that becomes tokens of the vocabulary (Chameleon)."""
    size = model.config.vq_config.resolution
    count = model.model.get_image_tokens(noise(1, 3, size, size)).numel()
    ids = torch.tensor([[3, *[IMAGE] * count, 7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(1, 3, size, size)}


PICTURES: dict[Callable[[Any], Inputs], str] = {
    square: "aria aya_vision blip-2 cohere2_vision deepseek_vl florence2 gemma3 got_ocr2 internvl janus llama4 llava "
    "ovis2 paligemma shieldgemma2 vipllava",
    tiles: "idefics2 idefics3 smolvlm",
    sized: "mistral3 pixtral lighton_ocr",
    sized_tiles: "llava_next llava_next_video llava_onevision",
    patches: "glm46v glm4v glm4v_moe glm_ocr qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe",
    shaped: "lfm2_vl",
    stacked: "paddleocr_vl",
    merged: "video_llama_3",
    named: "video_llava",
    twice: "deepseek_vl_hybrid",
}
"""Picture -> model types whose prompts hold a token for each feature of it."""

PROMPTS: dict[Callable[[Any], Inputs], str] = {
    beside: "blip git",
    crossed: "mllama",
    masked: "kosmos-2",
    asked: "instructblip",
    attended: "idefics",
    rendered: "pix2struct",
    written: "kosmos-2.5",
    laid_out: "udop",
    encoded: "t5gemma2",
    coded: "chameleon",
}
"""Whole inputs -> model types."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
GRID = {"image_grid_pinpoints": [[32, 64]]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
GLM = {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}}
CODES = {"<image>": IMAGE, **{f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z": 40 + code for code in range(16)}}
PIXTRAL = Whole(
    model_type="pixtral",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1], "window_size": 2}},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm46v": GLM,
    "glm4v": GLM,
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}, "head_dim": 16}},
    "glm_ocr": GLM,
    "llava_next": GRID,
    "llava_next_video": GRID,
    "llava_onevision": GRID,
    "chameleon": {"vocabulary_map": CODES, "vq_config": {"resolution": 32, "num_embeddings": 16}},
    "kosmos-2": {"latent_query_num": 4},
    "kosmos-2.5": {"latent_query_num": 4},
    "llama4": {"vision_config": {"intermediate_size": 128}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "num_global_layers": 1, "vision_output_dim": 96},
    },
    "pixtral": {"vision_config": PIXTRAL, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_5_moe": {"text_config": LINEAR},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4, "eoi_token_index": IMAGE + 1}},
    "udop": {"decoder_start_token_id": 1},
    "vipllava": {"vision_feature_layers": [-1, -2, 0]},
}
STRUCTURE = {"chameleon": {"vocabulary_map": CODES}}
"""Model type -> what its default config lacks to be built at its published size."""

TIMM = "its vision tower is a timm model, and timm is no dependency"
TOKENIZED = "its pictures become tokens of a vocabulary that its tokenizer's files carry; its text model has a row"
CAUSES: dict[str, str] = {
    "emu3": TOKENIZED,
    "ernie4_5_vl_moe": "it has a row among the models of the story, with a picture",
    "evolla": "it reads proteins, not pictures",
    "fast_vlm": TIMM,
    "fuyu": "it has no vision tower: patches go through one Linear; its text model has a row",
    "gemma3n": TIMM,
    "instructblipvideo": "it sees videos only; instructblip is the same model for pictures",
    "perception_lm": TIMM,
    "vision-encoder-decoder": "it is any encoder with any decoder, and these have rows",
}
FAST = ["llava", "qwen2_vl", "mllama"]


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each entry of the mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    inputs: dict[str, Callable[[Any], Inputs]] = {}
    for picture, kinds in PICTURES.items():
        inputs |= dict.fromkeys(kinds.split(), functools.partial(_prompt, picture))
    for prompt, kinds in PROMPTS.items():
        inputs |= dict.fromkeys(kinds.split(), prompt)
    for kind, class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        name = f"{kind} ({class_name})"
        if kind in CAUSES:
            yield Missing(GROUP, name, CAUSES[kind])
            continue
        build, full = (
            functools.partial(_build, class_name, kind),
            functools.partial(_full, class_name, STRUCTURE.get(kind, {})),
        )
        yield Case(GROUP, f"{name}, seeing", build, inputs[kind], greedy(), full, kind in FAST)


def _build(name: str, kind: str) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    accepted = inspect.signature(model_class.config_class.__init__).parameters
    tokens = {token: IMAGE for token in TOKEN_NAMES if token in accepted}
    model: nn.Module = model_class(tiny(model_class.config_class, **{**tokens, **OVERRIDES.get(kind, {})}))
    return model


def _full(name: str, structure: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class(**structure))
    return model


def _prompt(picture: Callable[[Any], Inputs], model: Any) -> Inputs:
    """Return a prompt with as many picture tokens as the tower gives features, and the picture."""
    seen = picture(model.config)
    ids = torch.tensor([[3, 4, *[IMAGE] * _features(model, seen), 7, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}


def _features(model: Any, seen: Inputs) -> int:
    look = getattr(model, "get_image_features", None) or model.model.get_image_features
    strategy = inspect.signature(look).parameters.get("vision_feature_select_strategy")
    options = {"vision_feature_select_strategy": "default"} if strategy and strategy.default is strategy.empty else {}
    with torch.no_grad():
        found = look(**seen, **options)
    if not isinstance(found, (Tensor, list, tuple)):
        pooled = getattr(found, "pooler_output", None)
        found = found.last_hidden_state if pooled is None else pooled
    parts = [found] if isinstance(found, Tensor) else found
    return sum(part.numel() // part.shape[-1] for part in parts)

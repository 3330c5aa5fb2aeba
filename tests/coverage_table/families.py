"""The other models of Transformers: encoders, encoder-decoders, vision, speech and what combines them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.coverage_table.case import IDS, Case, Inputs, Missing, greedy, noise
from tests.coverage_table.shrink import tiny

ENCODERS = "Transformers encoders"
SEQ2SEQ = "Transformers encoder-decoders"
VISION = "Transformers vision"
SPEECH = "Transformers speech"
BOTH = "Transformers vision and language"

NAMES: dict[str, str] = {
    ENCODERS: "bert roberta distilbert albert electra deberta deberta-v2 mpnet modernbert xlm-roberta longformer "
    "funnel convbert mobilebert squeezebert nystromformer fnet canine esm layoutlm mra splinter roformer big_bird",
    SEQ2SEQ: "t5 mt5 umt5 longt5 switch_transformers bart mbart pegasus pegasus_x marian m2m_100 led plbart prophetnet "
    "blenderbot blenderbot-small fsmt nllb-moe mvp bigbird_pegasus whisper speech_to_text moonshine",
    VISION: "vit deit beit swin swinv2 convnext convnextv2 dinov2 dinov2_with_registers resnet regnet bit segformer "
    "mobilenet_v2 mobilevit pvt ijepa clip_vision_model siglip_vision_model siglip2_vision_model vit_mae vit_msn yolos "
    "dpt hiera levit poolformer efficientnet",
    SPEECH: "wav2vec2 wav2vec2-conformer wav2vec2-bert hubert wavlm unispeech sew audio-spectrogram-transformer "
    "encodec mimi",
    BOTH: "clip siglip blip chinese_clip altclip clipseg groupvit vilt flava",
}
"""Group of the table -> model types, as Transformers' AutoModel knows them."""

SWIN: dict[str, Any] = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 2, "patch_size": 4}
CONVNEXT: dict[str, Any] = {"image_size": 64, "hidden_sizes": [16, 32, 32, 64]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "convnext": CONVNEXT,
    "convnextv2": CONVNEXT,
    "efficientnet": {"hidden_dim": 2560},
    "hiera": {"image_size": [64, 64], "embed_dim": 32, "num_heads": [1, 2, 4, 8]},
    "levit": {"image_size": 224, "patch_size": 16, "num_attention_heads": [2, 4, 4], "key_dim": [8, 8, 8]},
    "marian": {"pad_token_id": 0, "decoder_start_token_id": 0, "bad_words_ids": None},
    "mimi": {"num_filters": 8, "hidden_size": 64, "upsample_groups": 64},
    "pvt": {"image_size": 64},
    "swin": SWIN,
    "swinv2": SWIN,
    "t5": {"decoder_start_token_id": 1},
    "whisper": {"decoder_start_token_id": 1},
    "yolos": {"image_size": [64, 64]},
}
CAUSES: dict[str, str] = {}
FAST = ["bert", "t5", "bart", "whisper", "vit", "resnet", "wav2vec2", "clip"]


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each name."""
    from transformers.models.auto import modeling_auto as auto

    generating = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    for group, kinds in NAMES.items():
        for kind in kinds.split():
            names = generating[kind] if group == SEQ2SEQ else auto.MODEL_MAPPING_NAMES[kind]
            generate = greedy() if group == SEQ2SEQ else None
            yield _case(group, kind, names if isinstance(names, str) else names[0], generate)


def _case(group: str, kind: str, name: str, generate: Any) -> Case | Missing:
    if kind in CAUSES:
        return Missing(group, kind, CAUSES[kind])
    build = functools.partial(_build, name, OVERRIDES.get(kind, {}))
    full = functools.partial(_full, name)
    return Case(group, f"{kind} ({name})", build, inputs_of, generate, full, kind in FAST)


def _build(name: str, overrides: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    model: nn.Module = model_class(tiny(model_class.config_class, **overrides))
    return model


def _full(name: str) -> nn.Module:
    import transformers

    model_class = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class())
    return model


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs_of(model: Any) -> Inputs:
    """Return inputs for ``model`` by the names that its forward takes."""
    inputs = {model.main_input_name: _MAIN[model.main_input_name](model.config)}
    if "decoder_input_ids" in _arguments(model):
        inputs["decoder_input_ids"] = IDS
    if "spatial_shapes" in _arguments(model):
        inputs = {"pixel_values": noise(2, 16, 192), "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64)}
        inputs["spatial_shapes"] = torch.tensor([[4, 4], [2, 8]])
    if "pixel_values" in _arguments(model) and model.main_input_name == "input_ids":
        inputs["pixel_values"] = _pixels(model.config)
    return inputs


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _ids(config: Any) -> torch.Tensor:
    return IDS


def _pixels(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return noise(2, getattr(config, "num_channels", 3), height, width)


def _features(config: Any) -> torch.Tensor:
    if config.model_type in ("speech_to_text", "wav2vec2-bert"):  # time first
        return noise(2, 40, getattr(config, "input_feat_per_channel", 160))
    return noise(2, config.num_mel_bins, 2 * config.max_source_positions)


def _sound(config: Any) -> torch.Tensor:
    if config.model_type == "audio-spectrogram-transformer":
        return noise(2, config.max_length, config.num_mel_bins)
    return noise(2, 1, 2000) if config.model_type in ("encodec", "mimi", "dac") else noise(2, 2000)


_MAIN: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _sound,
}

"""The other models of Transformers: encoders, encoder-decoders, vision, speech and what combines them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.coverage_table.case import IDS, Case, Inputs, Missing, greedy, noise
from tests.coverage_table.shrink import tiny

MODELS = "Transformers models"
SEQ2SEQ = "Transformers encoder-decoders"

OVERRIDES: dict[str, dict[str, Any]] = {}
CAUSES: dict[str, str] = {}
FAST = "bert t5 whisper vit clip wav2vec2 bart".split()


def cases() -> Iterator[Case | Missing]:
    """Yield a row for each bare model without a decoder of `text`, then one for each text-to-text model."""
    from transformers.models.auto import modeling_auto as auto

    decoders = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for kind, names in auto.MODEL_MAPPING_NAMES.items():
        if kind not in decoders:
            yield _case(MODELS, kind, names if isinstance(names, str) else names[0], None)
    for kind, name in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        yield _case(SEQ2SEQ, kind, name, greedy())
    for kind, name in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.items():
        yield _case(SEQ2SEQ, kind, name, greedy())


def _case(group: str, kind: str, name: str, generate: Any) -> Case | Missing:
    import transformers

    if kind in CAUSES:
        return Missing(group, kind, CAUSES[kind])
    model_class = getattr(transformers, name)
    build = functools.partial(_build, model_class, OVERRIDES.get(kind, {}))
    full = functools.partial(_full, model_class)
    inputs = functools.partial(inputs_of, generating=generate is not None)
    return Case(group, f"{kind} ({name})", build, inputs, generate, full, kind in FAST)


def _build(model_class: Any, overrides: dict[str, Any]) -> nn.Module:
    model: nn.Module = model_class(tiny(model_class.config_class, **overrides))
    return model


def _full(model_class: Any) -> nn.Module:
    model: nn.Module = model_class(model_class.config_class())
    return model


# --- inputs -----------------------------------------------------------------------------------------------------------


def inputs_of(model: Any, generating: bool = False) -> Inputs:
    """Return inputs for ``model`` by the names that its forward takes."""
    inputs = {model.main_input_name: _MAIN[model.main_input_name](model.config)}
    if "decoder_input_ids" in _arguments(model) and not generating:
        inputs["decoder_input_ids"] = IDS[: len(next(iter(inputs.values())))]
    if "pixel_values" in _arguments(model) and model.main_input_name == "input_ids":
        inputs["pixel_values"] = _pixels(model.config)
    return inputs


def _arguments(model: Any) -> set[str]:
    return set(model.forward.__code__.co_varnames[: model.forward.__code__.co_argcount])


def _ids(config: Any) -> torch.Tensor:
    return IDS


def _pixels(config: Any) -> torch.Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return noise(2, getattr(config, "num_channels", 3), height, width)


def _features(config: Any) -> torch.Tensor:
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 80)
    return noise(2, bins, 2 * getattr(config, "max_source_positions", 32))


_MAIN: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": lambda config: noise(2, 2000),
}

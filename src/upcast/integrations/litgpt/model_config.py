"""model_config.yaml of a LitGPT checkpoint, as far as it can be believed: a model is built no larger than its weights.

A config is a few hundred bytes, and may ask for any number of layers. What the checkpoint holds bounds them.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcast.core import text_file
from upcast.core.errors import UpcastError, describe

CONFIG, WEIGHTS = "model_config.yaml", "lit_model.pth"
PACKED = "lit_model.safetensors"  # what convert --storage packed writes
LARGEST = 1 << 16  # bytes; LitGPT writes about 2,000
DEEPEST = 20
ROTARY = 1 << 30  # bytes that the tables of any model's rotary embedding may take


def read(folder: Path) -> dict[str, Any]:
    """Return the fields of the folder's config.

    Raises:
        UpcastError: there is none, or it is no such file.
    """
    path = folder / CONFIG
    if not os.path.exists(path):  # Path's own raises for some names
        raise UpcastError(
            f"no file {path}; a LitGPT checkpoint folder holds {CONFIG} and {WEIGHTS}. "
            "Check the path, or run `litgpt download`."
        )
    text = text_file.read(path, "config", LARGEST)
    try:
        fields = _parsed(text)
    except Exception as error:  # PyYAML fails in many ways
        raise _no_config(path, describe(error)) from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise _no_config(path, "it holds no names and values")
    for name, value in fields.items():
        if isinstance(value, int) and value.bit_length() > 63:
            raise _no_config(path, f"{name[:100]} is a number of {value.bit_length():,} bits")
    return fields


def weights(folder: Path) -> Path:
    """Return the folder's file of weights: LitGPT's own where it is there, or the packed one."""
    own, packed = folder / WEIGHTS, folder / PACKED
    return packed if os.path.isfile(packed) and not os.path.isfile(own) else own


def build(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Return the config's model, without memory.

    Raises:
        UpcastError: LitGPT cannot build it, or it is larger than ``tensors`` are.
    """
    from litgpt import GPT, Config

    path, weights_path = folder / CONFIG, weights(folder)
    for name, found in (("n_layer", _counted(tensors, "h")), ("n_expert", _counted(tensors, "experts"))):
        asked = fields.get(name, 0)
        if isinstance(asked, int) and asked > found:
            raise UpcastError(
                f"{path}: {name} is {asked}, and {weights_path} has the weights of {found}; weights and {CONFIG} "
                "must belong together. Download or convert the checkpoint again."
            )
    try:
        settings = Config(**fields)
        _check_rotary(settings, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        with torch.device("meta"):
            return GPT(settings)
    except Exception as error:  # whatever LitGPT makes of other names, kinds and sizes
        raise _no_config(path, describe(error)) from None


def _no_config(path: Path, why: str) -> UpcastError:
    return UpcastError(
        f"{path} is not a LitGPT config ({why}); it must be the file that LitGPT wrote. Download it again."
    )


def _parsed(text: str) -> Any:
    import yaml

    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:  # PyYAML looks at every level for each token
            raise ValueError(f"it is nested more than {DEEPEST} deep")
        if getattr(event, "value", None) == "<<":
            raise ValueError("it merges mappings (<<)")  # which can double each other; LitGPT writes none
    return yaml.safe_load(text)


def _counted(names: Iterable[str], kind: str) -> int:
    """Return how many ``kind.N.`` there are in one place."""
    found: dict[str, set[str]] = {}
    for name in filter(lambda name: len(name) < 1000, names):
        for match in re.finditer(rf"\b{kind}\.([0-9]+)\.", name):
            found.setdefault(name[: match.start()], set()).add(match[1])
    return max(map(len, found.values()), default=0)


def _check_rotary(settings: Any, held: int) -> None:
    """Refuse tables of cosines and sines for more positions than any model of this size has."""
    width = max(settings.rope_n_elem, 0) * (1 if getattr(settings, "rope_indices", None) is None else 2)
    if settings.block_size * width * 8 > max(ROTARY, held):
        raise ValueError(f"block_size is {settings.block_size}, too many positions for a model of {held:,} bytes")

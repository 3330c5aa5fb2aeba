"""The checkpoint folder that a conversion reads: what must be in it, and what comes along to the float16 copy."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcast.checkpoint import reading
from upcast.checkpoint.conversion_kind import Source
from upcast.checkpoint.output_folder import OWN, WEIGHTS
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import is_plain

CONFIG = "model_config.yaml"
NOT_COPIED = (
    ".pth",
    ".pt",
    ".bin",
    ".safetensors",
    ".ckpt",
    ".gguf",
    ".lora",
    ".adapter",
    ".adapter_v2",
    ".index.json",
)


def read_source(folder: Path) -> Source:
    """Return the checkpoint in ``folder``, mapped.

    Raises:
        UpcastError: it cannot be read, or holds tensors that are not dense.
    """
    identity = identity_of(folder)  # before the file is opened: what changes afterwards is told
    weights = reading.read(folder / WEIGHTS)
    _check_dense(folder / WEIGHTS, weights)
    return Source(folder, identity, {WEIGHTS: weights})


def is_usable(source: Source) -> bool:
    """Whether the file can be mapped, and every tensor used where it lies."""
    return reading.is_mappable(source.first) and all(map(is_plain, source.weights.values()))


def is_float16(source: Source) -> bool:
    """Whether every weight is float16 already."""
    weights = [t for t in source.weights.values() if t.dim() >= 2 and t.is_floating_point()]
    return bool(weights) and all(tensor.dtype == torch.float16 for tensor in weights)


def _check_dense(path: Path, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        kinds = {"meta": tensor.is_meta, "quantized": tensor.is_quantized, "nested": tensor.is_nested}
        found = [kind for kind, so in kinds.items() if so]
        if tensor.layout != torch.strided and not found:
            found = [str(tensor.layout).removeprefix("torch.")]
        if found:
            raise UpcastError(
                f"{path}: {name} is a {found[0]} tensor; convert takes dense tensors with their numbers. Save the "
                "state dict with such ones."
            )


def checkpoint_folder(folder: Path) -> Path:
    """Return the folder, looked for where LitGPT looks: as it is, then under ``checkpoints``."""
    try:
        found = next((each for each in (folder, "checkpoints" / folder) if each.is_dir()), None)
        if found is None:
            raise UpcastError(f"no folder {folder}; convert takes a LitGPT checkpoint folder. Check the path.")
        for name in (CONFIG, WEIGHTS):
            if not (found / name).is_file():
                raise UpcastError(
                    f"no file {found / name}; a LitGPT checkpoint folder holds {CONFIG} and {WEIGHTS}. "
                    "Check the path, or run `litgpt download`."
                )
        return found.resolve()
    except OSError as error:
        raise UpcastError(f"{folder}: {error.strerror}; convert must be able to read it. Check the path.") from None


def identity_of(folder: Path) -> dict[str, Any]:
    """Return what tells whether the source is still the same.

    Time and size do not alone: copies, archives and images may give other weights those of the ones before.
    """
    weights = folder / WEIGHTS
    found, crc = weights.stat(), reading.checksum(weights)
    return {"folder": folder.name, "bytes": found.st_size, "modified_ns": found.st_mtime_ns, "crc32": f"{crc:08x}"}


def beside(folder: Path) -> list[Path]:
    """Return the files that come along."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name not in OWN
    ]

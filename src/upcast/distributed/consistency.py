"""What must be the same on every rank before they compute together, as a record that `Group.agree` compares."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from upcast.core.about import VERSION
from upcast.core.pages import give_back_pages

_SAMPLE = 16  # numbers from each place of a tensor


def record(config: bytes, weights: Mapping[str, Tensor], **options: str) -> dict[str, str]:
    """Return the record of a model with this configuration and these weights, loaded with ``options``."""
    return {
        "upcast version": VERSION,
        "torch version": torch.__version__,
        "model config": f"{zlib.crc32(config):08x}",
        "checkpoint": fingerprint(weights),
        **options,
    }


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of names, shapes, dtypes and a few numbers from the start, middle and end of each tensor."""
    crc = 0
    for name, tensor in sorted(weights.items()):
        crc = zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), crc)
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()[:_SAMPLE]
        for start in (0, flat.numel() // 2, max(0, flat.numel() - _SAMPLE)):
            crc = zlib.crc32(str(flat[start : start + _SAMPLE].tolist()).encode(), crc)
        give_back_pages(tensor)  # a look may map 2 MiB
    return f"{crc:08x}"

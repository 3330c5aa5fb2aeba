"""What must be the same on every rank before they compute together, as a record that `Group.agree` compares."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from upcast.core.about import VERSION
from upcast.core.pages import give_back_pages
from upcast.tensor.packed_weight import PackedWeight

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
        held = _in_memory(tensor)
        flat = held.reshape(-1) if held.is_contiguous() else held.flatten()[:_SAMPLE]
        for start in (0, flat.numel() // 2, max(0, flat.numel() - _SAMPLE)):
            crc = zlib.crc32(str(flat[start : start + _SAMPLE].tolist()).encode(), crc)
        give_back_pages(held)  # a look may map 2 MiB
    return f"{crc:08x}"


def _in_memory(tensor: Tensor) -> Tensor:
    """Return the bytes of a packed weight, whose numbers would all have to be unpacked, or else the tensor itself."""
    held = tensor.store.bytes if isinstance(tensor, PackedWeight) else None
    return tensor.detach() if held is None else held

"""What models return: tensors, tuples, mappings, dataclasses, and these inside one another."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def find_answer(output: Any) -> Tensor | None:
    """Return the tensor that a model is judged by, or None."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping) or is_dataclass(output):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        found = find_answer(logits)
        if found is not None:
            return found
        named = output.values() if isinstance(output, Mapping) else (getattr(output, f.name) for f in fields(output))
        return next((part for part in map(find_answer, named) if part is not None), None)
    if isinstance(output, (list, tuple)):
        parts = list(map(find_answer, output))
        if parts and all(isinstance(each, Tensor) and each.is_floating_point() for each in output):
            same = {(each.shape[:-2], each.shape[-1]) for each in output if each.dim() > 1}
            if isinstance(output, list) and len(same) == 1 and all(each.dim() > 1 for each in output):
                return torch.cat(output, dim=-2)  # logits in chunks
        return next((part for part in parts if part is not None), None)
    return None


def tensors(output: Any, name: str = "result") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the floating-point tensors in what a model returns; mappings' keys are names."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors(value, str(key))
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors(getattr(output, field.name), field.name)
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from tensors(value, f"{name}[{index}]")

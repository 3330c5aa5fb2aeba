"""What can be patched: the module inside what users hand over, its tensors, and every reason to refuse it."""

import fnmatch
import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upcast.errors import UpcastError
from upcast.half_weight import HalfWeight


@dataclass
class Slot:
    """One tensor of a model and every place that holds it (several when tied)."""

    name: str
    tensor: Tensor
    is_parameter: bool
    places: list[tuple[nn.Module, str]]


def slots(model: nn.Module) -> list[Slot]:
    """Return the parameters and buffers of ``model``, each tensor once, with all of its places."""
    found: dict[int, Slot] = {}
    for prefix, module in model.named_modules():
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    slot = found.setdefault(id(tensor), Slot(full, tensor, is_parameter, []))
                    slot.places.append((module, name))
    return list(found.values())


def prepare(model: object, keep: Sequence[str]) -> tuple[nn.Module, list[Slot]]:
    """Return the module to patch and its tensors, after every check that can refuse it. Changes nothing."""
    root = unwrap(model)
    found = slots(root)
    name = type(root).__name__
    for slot in found:
        _check_tensor(slot, name)
    names = [slot.name for slot in found if slot.is_parameter]
    for pattern in keep:
        if not any(matches(each, pattern) for each in names):
            raise UpcastError(
                f"keep pattern {pattern!r} matches no parameter of {name}; a pattern names a parameter or a module, "
                f"such as {names[-1] if names else 'lm_head'!r}. See print(upcast.plan(model)) for the names."
            )
    _check_optimizers(found)
    return root, found


def unwrap(model: object) -> nn.Module:
    """Return the module inside what users hand over: a pipeline, a Fabric wrapper, or the module itself."""
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise UpcastError(
                f"a {type(model).__name__}; upcast patches a torch.nn.Module, or an object whose .model is one "
                "(such as a Transformers pipeline). Pass the module itself."
            )
        return unwrap(inner)
    if type(model).__name__ == "_FabricModule":
        return unwrap(model.module)
    if type(model).__name__ == "LLM" and getattr(model, "model", model) is None:
        raise UpcastError(
            "a litgpt LLM without a model; it was loaded with distribute=None. Call llm.distribute() first."
        )
    return model


def _check_tensor(slot: Slot, model: str) -> None:
    tensor = slot.tensor
    if isinstance(tensor, HalfWeight):
        raise UpcastError(
            f"{model} is patched already ({slot.name} is stored in float16); a model is patched once. "
            "Call upcast.unpatch(model) first to patch it differently."
        )
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise UpcastError(f"{slot.name} of {model} has no shape yet; run one forward pass first.")
    if tensor.is_meta:
        raise UpcastError(
            f"{slot.name} of {model} is on the meta device: it has no numbers to store. Load the weights first."
        )
    if tensor.device.type != "cpu":
        raise UpcastError(
            f"{slot.name} of {model} is on {tensor.device}; upcast computes on the CPU. Call model.to('cpu') first."
        )


def _check_optimizers(found: Sequence[Slot]) -> None:
    """Refuse a parameter that an optimizer holds: replaced, it would silently stop learning."""
    trainable = {id(slot.tensor): slot.name for slot in found if slot.is_parameter and slot.tensor.requires_grad}
    if not trainable:
        return
    for candidate in gc.get_objects():
        if issubclass(type(candidate), torch.optim.Optimizer):
            for group in candidate.param_groups:
                for tensor in group["params"]:
                    if id(tensor) in trainable:
                        raise UpcastError(
                            f"{trainable[id(tensor)]} requires grad and a {type(candidate).__name__} optimizer holds "
                            "it; a weight stored in float16 is frozen. Delete the optimizer, or patch the model "
                            "before creating one for the parameters that still require grad."
                        )


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this tensor or a module that holds it: 'lm_head', '*.norm*', 'h.0.mlp.fc.weight'."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))

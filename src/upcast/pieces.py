"""A piece of a patched model that is used by itself: a layer, a block, a container of some of them.

It has no record of its own, but its weights know what they were.
"""

import torch
from torch import Tensor, nn

from upcast import console, kernels, materialize
from upcast.half_weight import HalfWeight
from upcast.slot import Slot
from upcast.targets import slots

_UNPATCHED = "a piece of the model was unpatched"


def weights_of(root: nn.Module) -> dict[str, HalfWeight]:
    """Return the weights of ``root`` that are stored in float16, by their names in it."""
    return {slot.name: slot.tensor for slot in slots(root) if _in_float16(slot)}  # type: ignore[misc]


def _in_float16(slot: Slot) -> bool:
    return isinstance(slot.tensor, HalfWeight) and slot.tensor.store.half is not None


def restore(weights: dict[str, HalfWeight]) -> None:
    """Make weights what they were before the patch. The objects stay the same: whoever shares one has it as well."""
    for weight in weights.values():
        dtype = weight.store.before
        materialize.materialize(weight, _UNPATCHED)
        if dtype != torch.float32:
            weight.data = weight.data.to(dtype)


def report(root: nn.Module, weights: dict[str, HalfWeight]) -> str:
    """Return what `upcast.report` says of a piece."""
    first = next(iter(weights.values()))
    others = [slot for slot in slots(root) if slot.is_parameter and slot.name not in weights]
    rows = [(name, _shape(weight), "float16") for name, weight in weights.items()]
    rows += [(slot.name, _shape(slot.tensor), str(slot.tensor.dtype).removeprefix("torch.")) for slot in others]
    size = console.megabytes(sum(weight.stored.nbytes for weight in weights.values()))
    return "\n".join(
        [
            console.table(("tensor", "shape", "stored in"), rows),
            f"{type(root).__name__}: a piece of a patched {first.fallbacks.model}, which has the whole report; "
            f"{len(weights)} weights in float16, {size}",
            f"kernels: {kernels.describe()}",
            f"widened whole, in all of {first.fallbacks.model}: {first.fallbacks}",
        ]
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))

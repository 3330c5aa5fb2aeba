"""A piece of a patched model that is used by itself: a layer, a block, a container of some of them.

It has no record of its own, but its weights know what they were.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core import console, messages
from upcast.core.errors import UpcastError
from upcast.core.tensor_ref import TensorRef
from upcast.patching import transaction
from upcast.patching.discovery import refs
from upcast.patching.parts import parts_of, roots_of
from upcast.tensor import materialize
from upcast.tensor.half_weight import HalfWeight

_UNPATCHED = "a piece of the model was unpatched"


def weights_of(root: nn.Module) -> dict[str, HalfWeight]:
    """Return the weights of ``root`` that are stored in float16, by their names in it."""
    return {ref.name: ref.tensor for ref in refs(root) if _in_float16(ref)}  # type: ignore[misc]


def _in_float16(ref: TensorRef) -> bool:
    return isinstance(ref.tensor, HalfWeight) and ref.tensor.reclaim()


def pieces_of(model: object) -> dict[nn.Module, dict[str, HalfWeight]]:
    """Return the pieces that ``model`` is, with their weights; nothing if it is patched itself, or not at all."""
    found = {} if parts_of(model) else {root: weights_of(root) for root in roots_of(model).values()}
    return {root: weights for root, weights in found.items() if weights}


def refuse(root: nn.Module) -> None:
    """Raise UpcastError if ``root`` is a piece."""
    for weights in pieces_of(root).values():
        raise UpcastError(
            f"this {type(root).__name__} is a piece of a patched {_whole(weights)}, which has the record of the patch. "
            "Pass the whole model, or unpatch the piece."
        )


def unpatch(model: object) -> bool:
    """Unpatch ``model`` if it is a piece; return whether it is one.

    What was cut short is done to its end: while a weight is left in float16, this does the rest.
    """
    found = pieces_of(model)
    for root, weights in found.items():
        whole = _whole(weights)
        wanted = [(weight, weight.store.before) for weight in weights.values()]
        materialize.check(weights.values(), _UNPATCHED)
        try:
            transaction.remove(root)
            _restore(wanted)
        except BaseException:
            transaction.remove(root)
            _restore(wanted)
            raise
        messages.say(f"{type(root).__name__}, a piece of a patched {whole}, unpatched; the rest stays as it is")
    return bool(found)


def report(model: object) -> str:
    """Return what `upcast.report` says of a piece, or nothing if ``model`` is none."""
    return "\n\n".join(_report(root, weights) for root, weights in pieces_of(model).items())


def _whole(weights: dict[str, HalfWeight]) -> str:
    return next(iter(weights.values())).fallbacks.model


def _restore(wanted: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    """Give weights the dtypes from before the patch. The objects stay the same: whoever shares one has it as well."""
    for weight, dtype in wanted:
        if isinstance(weight, HalfWeight):
            materialize.materialize(weight, _UNPATCHED)
        if weight.dtype != dtype:
            weight.data = weight.data.to(dtype)


def _report(root: nn.Module, weights: dict[str, HalfWeight]) -> str:
    first = next(iter(weights.values()))
    others = [ref for ref in refs(root) if ref.is_parameter and ref.name not in weights]
    rows = [(name, _shape(weight), weight.store.name) for name, weight in weights.items()]
    rows += [(ref.name, _shape(ref.tensor), str(ref.tensor.dtype).removeprefix("torch.")) for ref in others]
    size = console.megabytes(sum(weight.nbytes for weight in weights.values()))
    return "\n".join(
        [
            console.table(("tensor", "shape", "stored in"), rows),
            f"{type(root).__name__}: a piece of a patched {first.fallbacks.model}, which has the whole report; "
            f"{len(weights)} weights stored so, {size}",
            f"kernels: {kernels.describe()}",
            f"upcast whole, in all of {first.fallbacks.model}: {first.fallbacks}",
        ]
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))

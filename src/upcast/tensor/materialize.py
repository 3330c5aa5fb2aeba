"""How a weight stored in float16 becomes an ordinary float32 tensor, where float16 cannot serve.

The object stays the same: an optimizer, a module or a list that holds it goes on with an ordinary parameter. Its views
follow when they are next used. It is said once per model and reason; `upcast.report` counts.
"""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upcast.core import extensions, messages
from upcast.core.errors import UpcastError
from upcast.core.torch_modes import without_overrides

if TYPE_CHECKING:
    from upcast.tensor.half_weight import HalfWeight
    from upcast.tensor.store import Store

# why, as the end of a sentence
OUT_OF_RANGE = "values beyond 65504, or not finite, were written into them"
SMALL_STEPS = "they are updated in steps that float16 would lose"
MEMORY = "their memory was asked for (as float32 bytes, or to be shared)"
GRADIENT = "the program asks for their gradients"
TRAINING = "the model runs in training mode while gradients are recorded"

_TRAINERS = {
    "torch.optim.optimizer": "an optimizer is given them",
    "torch.nn.parallel.distributed": "DistributedDataParallel is given them",
}


def dissolve(weight: "HalfWeight", why: str) -> None:
    """Move the numbers of ``weight``, and of every view that shares them, to float32 memory; say why, once."""
    dissolve_store(weight.store, why)


def dissolve_store(store: "Store", why: str) -> None:
    """As `dissolve`, for all that stands for the numbers of ``store``."""
    if store.dissolve():
        _note(store, why)


def _note(store: "Store", why: str) -> None:
    if store.wide is not None and store.fallbacks.dissolve(why, store.wide.numel()):
        model = store.fallbacks.model
        messages.say(f"{model}: weights become ordinary float32 parameters, because {why}; upcast.report counts them")


def keep(weight: "HalfWeight", why: str) -> None:
    """Let memory that ``weight`` borrowed be its own float32 memory for good."""
    if weight.store.keep_borrowed():
        _note(weight.store, why)


def alias(weight: "HalfWeight") -> Tensor:
    """Return an ordinary tensor in the float32 memory of a dissolved weight."""
    wide = weight.store.wide
    assert wide is not None
    return wide.detach() if weight.region is None else weight.region.of(wide)


def materialize(weight: "HalfWeight", why: str) -> None:
    """Make ``weight`` an ordinary float32 parameter (or tensor, where it is a view); the same object.

    Raises:
        UpcastError: something inside torch holds the tensor (a graph, torch.compile): it cannot be exchanged.
    """
    dissolve(weight, why)
    if not become(weight):
        raise _held(why)


def check(weights: Iterable["HalfWeight"], why: str) -> None:
    """Raise the error of `materialize` if it could not exchange one of ``weights``; changes nothing."""
    if any(_in_use(weight) for weight in weights):
        raise _held(why)


def _held(why: str) -> UpcastError:
    return UpcastError(
        f"a weight stored in float16 is to become float32, because {why}, but something inside torch holds it, "
        "such as a graph of autograd. Do this before the forward pass, or patch the model with keep=[...]."
    )


def _in_use(tensor: Tensor) -> bool:
    """Whether something inside torch holds ``tensor``."""
    return bool(without_overrides(Tensor._use_count, tensor) > 1)  # type: ignore[attr-defined]


def become(weight: "HalfWeight") -> bool:
    """Exchange a dissolved weight for an ordinary tensor; return whether that was possible."""
    keep(weight, MEMORY)
    attributes, is_parameter = weight.attributes(), isinstance(weight, torch.nn.Parameter)
    with torch._C._InferenceMode(False):
        plain = alias(weight)
        new = torch.nn.Parameter(plain, weight.wants_grad) if is_parameter else plain.requires_grad_(weight.wants_grad)
        new.__dict__.update(attributes)
        return bool(without_overrides(_exchange, weight, new))


def _exchange(weight: Tensor, new: Tensor) -> bool:
    """Do what ``torch.utils.swap_tensors`` does, which refuses weak references: recurrent layers hold some.

    They stay right, since the object is the same. Return whether nothing inside torch holds either tensor.
    """
    if _in_use(weight) or _in_use(new):
        return False
    kinds, states, memory = (type(weight), type(new)), (weight.__dict__, new.__dict__), weight._cdata
    try:
        weight.__class__, new.__class__ = kinds[1], kinds[0]
        weight.__dict__, new.__dict__ = states[1], states[0]
        torch._C._swap_tensor_impl(weight, new)
    except BaseException:  # an interruption, before the memory was exchanged or after it
        done = weight._cdata != memory
        weight.__class__, new.__class__ = kinds[done], kinds[not done]
        weight.__dict__, new.__dict__ = states[done], states[not done]
        raise
    return True


def trainer(frame: FrameType) -> str | None:
    """Return why a caller's question means that the weight is to be trained, or None: it only looks."""
    return _TRAINERS.get(frame.f_globals.get("__name__", ""))


def uses_gradients(frame: FrameType) -> bool:
    """Whether the caller would compute with a gradient: torch's own code looks to clear it, or while it traces."""
    module = str(frame.f_globals.get("__name__", ""))
    return not module.startswith("torch.") or module.startswith("torch.nn.utils.")


def copied_by_an_adapter() -> bool:
    """Whether the copy that is being made is an adapter library's: it learns, or takes numbers that have."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _copies(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame is not None and extensions.copies_to_train(frame.f_globals.get("__name__", ""))


def _copies(module: str) -> bool:
    return module == "copy" or module.startswith("upcast.")

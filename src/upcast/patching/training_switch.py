"""When a model that was patched for inference begins to train: what requires grad becomes float32, and learns.

An optimizer or DistributedDataParallel that is given the weights says so itself (`upcast.tensor.memory_ops`). Here is
the other sign: the model goes into training mode, and then runs while gradients are recorded.
"""

from typing import Any

import torch
from torch import nn

from upcast.core.forward_override import Forward
from upcast.core.module_tree import modules
from upcast.tensor import materialize
from upcast.tensor.half_weight import HalfWeight


class TrainingSwitch(Forward):
    """``train`` of a patched model: in training mode, its next forward pass under autograd begins the training."""

    method = "train"

    def __call__(self, mode: bool = True) -> Any:
        """Set the mode, as ``Module.train`` does, and return the module."""
        root = self.module
        type(root).train(root, mode)
        _watch(root, mode)
        return root


def install(root: nn.Module) -> None:
    """Have ``root`` know when it goes into training mode; one that is in it already says nothing by that."""
    root.__dict__["train"] = TrainingSwitch(root)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    root.__dict__.pop("train", None)
    _watch(root, mode=False)


def _watch(root: nn.Module, mode: bool) -> None:
    hooks = root._forward_pre_hooks
    ours = [key for key, hook in hooks.items() if hook is _begin]
    if mode and not ours and _waiting(root):
        root.register_forward_pre_hook(_begin)
    for key in ours if not mode else ():
        del hooks[key]


def _waiting(root: nn.Module) -> list[HalfWeight]:
    """Return the weights that require grad and are stored in float16."""
    found: list[Any] = [parameter for module in modules(root) for parameter in module._parameters.values()]
    return [parameter for parameter in found if isinstance(parameter, HalfWeight) and parameter.wants_grad]


def _begin(root: nn.Module, _: Any) -> None:
    if root.training and torch.is_grad_enabled():
        for weight in _waiting(root):
            materialize.materialize(weight, materialize.TRAINING)
        _watch(root, mode=False)  # it has begun

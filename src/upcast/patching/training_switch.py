"""When a model that was patched for inference begins to train: what requires grad becomes float32, and learns.

An optimizer or DistributedDataParallel that is given the weights says so itself (`upcast.tensor.memory_ops`). Here is
the other sign: the model goes into training mode, and then runs while gradients are recorded.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from upcast.core.forward_override import Forward
from upcast.core.module_tree import modules
from upcast.tensor import materialize
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.store import Fallbacks, Store


class TrainingSwitch(Forward):
    """``train`` of a patched model's children: in training mode, what runs under autograd begins the training.

    Not of the model itself: in ``load().train()`` nobody holds it any more once its ``train`` has been looked up. A
    model that has no children is made anew then, of what it held.
    """

    method = "train"
    held: dict[str, Any] | None = None  # by a model without children

    def __init__(self, module: nn.Module, root: nn.Module, account: Fallbacks, place: int) -> None:
        super().__init__(module)
        self._root: Callable[[], nn.Module | None] = weakref.ref(root)
        self.account, self.place, self.kind = account, place, type(module)
        if module is root:
            self.held = dict(module.__dict__)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_root": _nowhere}  # a copy of a child takes no copy of the model along

    def __call__(self, mode: bool = True) -> Any:
        """Set the mode, as ``Module.train`` does, and return the module."""
        module, root = self._alive() or self._anew(), self._root()
        type(module).train(module, mode)
        if mode:
            self.account.learning.add(self.place)
            Store.learning = True
        else:
            self.account.learning.discard(self.place)
        _watch(root if root is not None and root.training == mode else module, mode)
        return module

    def _anew(self) -> Any:
        if self.held is None:
            return self.module  # an error
        module = object.__new__(self.kind)
        module.__dict__.update(self.held, train=self)
        self._module = weakref.ref(module)
        return module


def _nowhere() -> None:
    """What stands for the model in a copy of one of its children."""


def install(root: nn.Module) -> None:
    """Have ``root`` know when it goes into training mode; one that is in it already says nothing by that."""
    waiting = _waiting(root)
    for place, module in enumerate([*root.children()] or [root]) if waiting else ():
        if "train" not in module.__dict__:
            module.__dict__["train"] = TrainingSwitch(module, root, waiting[0].fallbacks, place)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    for module in modules(root):
        if isinstance(module.__dict__.get("train"), TrainingSwitch):
            del module.__dict__["train"]
        _watch(module, mode=False)


def _watch(module: nn.Module, mode: bool) -> None:
    hooks = module._forward_pre_hooks
    ours = [key for key, hook in hooks.items() if hook is _begin]
    if mode and not ours and _waiting(module):
        module.register_forward_pre_hook(_begin)
    for key in ours if not mode else ():
        del hooks[key]


def _waiting(root: nn.Module) -> list[HalfWeight]:
    """Return the weights that require grad and are stored in float16."""
    found: list[Any] = [parameter for module in modules(root) for parameter in module._parameters.values()]
    return [parameter for parameter in found if isinstance(parameter, HalfWeight) and parameter.wants_grad]


def _begin(module: nn.Module, _: Any) -> None:
    if module.training and torch.is_grad_enabled():
        for weight in _waiting(module):
            materialize.materialize(weight, materialize.TRAINING)
        _watch(module, mode=False)  # it has begun

"""The state before a step: what the guard puts back to run the step again."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upcast.core import extensions
from upcast.core.module_tree import modules

_PLAIN = (bool, int, float, str, type, type(None), torch.dtype, torch.device)


class State:
    """What a step may change in the caches that it is given, and how to put it back.

    Caches of keys and values grow by replacing their tensors, or are written at the positions of the step, which the
    repeated step writes again: references are enough, and nothing is copied. Other states (of state-space models, of
    windows that move along in place) are copied. In training mode random numbers and the statistics of batch norms come
    back as well.
    """

    def __init__(self, args: Any, kwargs: Any, module: nn.Module) -> None:
        self._random = torch.get_rng_state() if module.training else None
        self._objects: list[tuple[Any, Any]] = []
        self._kinds: list[tuple[Any, type]] = []  # a layer that gives up float16 changes its class
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._seen: set[int] = set()
        for value in (*args, *kwargs.values()):
            if not isinstance(value, (Tensor, *_PLAIN)):
                self._take(value)
        for norm in modules(module) if module.training else ():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                for buffer in norm.buffers():
                    self._take(buffer)

    def restore(self) -> None:
        """Put everything back."""
        if self._random is not None:
            torch.set_rng_state(self._random)
        for owner, kind in self._kinds:
            owner.__class__ = kind
        for container, content in self._objects:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        with torch.no_grad():
            for tensor, copied in self._tensors:
                tensor.copy_(copied)

    def _take(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensors.append((value, value.detach().clone()))
            return
        if isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, list):
            self._objects.append((value, list(value)))
        if isinstance(value, (list, tuple, set)):
            for each in value:
                self._take(each)
        else:
            self._take_fields(value)

    def _take_fields(self, value: Any) -> None:
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", None)
        if fields is None or isinstance(value, nn.Module) or not _is_state(value):
            return
        self._objects.append((fields, dict(fields)))
        if fields is not value:
            self._kinds.append((value, type(value)))
        appended = frozenset().union(*(each.appended(value) for each in extensions.registered()))
        for key, each in fields.items():
            if key not in appended and not isinstance(each, _PLAIN):
                self._take(each)


def _is_state(value: Any) -> bool:
    """Whether an argument can be a cache: a mapping, or an object whose kind says so; not configs and the like.

    What another module returned (a dataclass, as an encoder's result) is read and not changed.
    """
    if isinstance(value, Mapping):
        return not is_dataclass(value)
    return any(word in type(value).__name__ for word in ("Cache", "Layer", "State"))

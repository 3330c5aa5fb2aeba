"""What a fused forward has collected from modules, and what tells that they have changed since."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from torch import nn

from upcast.core import torch_private
from upcast.kernels import native
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.packed_weight import LENT


class Members:
    """The classes, submodules, parameters, buffers, forwards and stored weights of ``modules``, as they are now.

    Collecting them takes as long as a tenth of a token, so that what was made of them is kept until they differ. They
    hold on to the weights and caches they name until the next look.

    Args:
        modules: those whose members and hooks count.
        also: further modules of which only the direct members count.
        names: attributes of each of ``modules`` that count, where it has them in its ``__dict__``.
        method: the name of a method of which counts whether one of ``modules`` has one of its own.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        also: Iterable[nn.Module] = (),
        names: Iterable[str] = (),
        method: str | None = None,
    ) -> None:
        states = [module.__dict__ for module in modules]
        self._modules, self._kinds = modules, [*map(type, modules)]
        # Hooks on gradients cannot matter: the fused forwards of whole blocks run only where there are none.
        self._hooks = [state[name] for state in states for name in ("_forward_hooks", "_forward_pre_hooks")]
        members = [state[name] for state in states for name in ("_modules", "_parameters", "_buffers")]
        self._members = [*(module._modules for module in also), *filter(None, members)]
        looked_up = [(state, "forward") for state in states]
        looked_up += [(state, name) for name in names for state in states if name in state]
        if method is not None:
            looked_up += [(module.__dict__, method) for module in modules if hasattr(module, method)]
        weights: list[Any] = [weight for module in modules for weight in module._parameters.values()]
        looked_up += [
            (weight.store.__dict__, weight.store.field) for weight in weights if isinstance(weight, HalfWeight)
        ]
        self._owners, self._names = [owner for owner, _ in looked_up], [name for _, name in looked_up]
        self._kept = [*chain.from_iterable(map(dict.values, self._members)), *map(dict.get, self._owners, self._names)]

    def watched(self) -> bool:
        """Whether someone watches one of the modules."""
        return not native.all_empty(self._hooks) or torch_private.any_global_hook()

    def same(self) -> bool:
        """Whether nothing was replaced since."""
        if LENT:  # somebody may have written into a state dict
            return False
        same = native.unchanged(self._kept, self._members, self._owners, self._names)
        return same and [*map(type, self._modules)] == self._kinds

"""One tensor of a model: what it is called, where it is held, and whether it learns."""

import weakref
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class TensorRef:
    """One tensor of a model and every owner, a module and its name for it (several when tied)."""

    name: str
    tensor: Tensor
    is_parameter: bool
    owners: list[tuple[nn.Module, str]]
    learns: bool = False  # it gets gradients, and stays the float32 parameter that it is
    wants_grad: bool = False  # it requires grad, and goes to float16 until something trains it
    freezes: bool = False  # it requires grad, and the program has named others to learn

    @property
    def is_weight(self) -> bool:
        """Whether this is a parameter of the kind that float16 is for."""
        return self.is_parameter and self.tensor.is_floating_point() and self.tensor.dim() >= 2


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put ``tensor`` in its place; recurrent layers list their weights twice more, once by weak references."""
    setattr(module, name, tensor)
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = [None if each is None else weakref.ref(each) for each in module._flat_weights]

"""``ordinary.data = weight.data``: refused where it is written, since torch would read memory that is not there.

The setter of ``data`` asks only the tensor that it is called on, never the one that it is given, and then takes over
memory and shape below Python. It does ask torch whether the two are compatible; here is the answer for HalfWeights.
For all other tensors the answer is torch's own.
"""

import torch
from torch import Tensor

from upcast.errors import UpcastError
from upcast.half_weight import HANDLERS, HalfWeight

_asked = torch.ops.aten._has_compatible_shallow_copy_type.default


def compatible(target: Tensor, source: Tensor) -> bool:
    """Return whether ``target`` can take over what ``source`` holds, as torch has it.

    Raises:
        UpcastError: the memory of ``source`` is float16, and ``target`` is an ordinary tensor.
    """
    if type(source) is HalfWeight and type(target) is not HalfWeight:
        raise UpcastError(
            "a weight stored in float16 as the .data of an ordinary tensor; the two cannot be one memory. Assign the "
            "parameter itself (layer.weight = other.weight), or a copy (layer.weight.data = other.weight.data.clone())."
        )
    with torch._C._AutoDispatchBelowAutograd(), torch._C.DisableTorchFunctionSubclass():
        same: bool = _asked(target, source)
    return same


_library = torch.library.Library("aten", "IMPL")
_library.impl("_has_compatible_shallow_copy_type", compatible, "AutogradCPU")
HANDLERS[_asked] = compatible  # in inference mode it comes by `HalfWeight.__torch_dispatch__`

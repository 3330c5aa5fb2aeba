"""``ordinary.data = weight.data``: torch would take over memory that is not there, and asks nobody in Python.

The setter of ``data`` asks only the tensor that it is called on, and then takes over what the other one's inner part
holds, below Python. Before that it asks whether the two are compatible. There a HalfWeight goes to float32 and is given
that memory, so that both share it, as torch means it. For all other tensors the answer is torch's own.
"""

import torch
from torch import Tensor

from upcast.tensor import materialize
from upcast.tensor.half_weight import HANDLERS, HalfWeight

_asked = torch.ops.aten._has_compatible_shallow_copy_type.default
_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
_PYTHON |= torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)


def compatible(target: Tensor, source: Tensor) -> bool:
    """Return whether ``target`` can take over what ``source`` holds, as torch has it."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._AutoDispatchBelowAutograd():
        if isinstance(source, HalfWeight) and not isinstance(target, HalfWeight):
            materialize.dissolve(source, materialize.MEMORY)
            with torch._C._ExcludeDispatchKeyGuard(_PYTHON):
                Tensor.set_(source, materialize.alias(source))  # type: ignore[call-overload]
        with torch._C._ExcludeDispatchKeyGuard(_PYTHON):
            same: bool = _asked(target, source)
    return same


_library = torch.library.Library("aten", "IMPL")
_library.impl("_has_compatible_shallow_copy_type", compatible, "AutogradCPU")
HANDLERS[_asked] = compatible  # in inference mode it comes by `HalfWeight.__torch_dispatch__`

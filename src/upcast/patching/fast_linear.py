"""nn.Linear without the detour: what a patched layer runs when nothing unusual is asked of it.

The way over ``__torch_function__`` costs a microsecond or two per call, as much as a small product itself. A patched
``nn.Linear`` therefore carries a forward of its own, which goes straight to the kernel in inference and takes the
ordinary way for everything else (gradients, tracing, other dtypes, a weight, a class or a function that has been
replaced).
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcast import kernels
from upcast.core import forward_override as forwards
from upcast.core.errors import UpcastError
from upcast.core.forward_override import Forward
from upcast.core.module_tree import modules
from upcast.kernels import Operand, native, packed, transforms
from upcast.tensor import autocast, genuine
from upcast.tensor.genuine import bound
from upcast.tensor.half_weight import HalfWeight, resolved
from upcast.tensor.packed_weight import PackedWeight

# Looked up once: a call costs little more than its lookups.
_traced, _dynamo, _autocast = torch.compiler.is_compiling, transforms.dynamo, autocast.enabled
_Linear = nn.Linear
_its = genuine.namespace(nn.Linear)
_forward = _its["forward"] if genuine.is_own(_its["forward"], "forward", "torch") else None
_linear = torch._C._nn.linear  # what torch.nn.functional.linear is, unless someone replaced it
_MISSING: Any = object()
STORED = (HalfWeight, PackedWeight)
_quiet = native.quiet
_questions = [torch.is_grad_enabled, torch._C._len_torch_function_stack, _autocast, *transforms.questions()]
_owners, _names, _kept = map(
    list, zip((_its, "forward", _forward), (vars(F), "linear", _linear), *transforms.flags(), strict=True)
)


class LinearForward(Forward):
    """The forward of one patched ``nn.Linear``."""

    owner = "linear"
    fast = True

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(bound(self.module))

    def __call__(self, input: Any = _MISSING, *args: Any, **kwargs: Any) -> Any:
        """Return ``input @ weight.T + bias`` in float32: input (..., K), result (..., N).

        More arguments are for a forward that someone gave the class.
        """
        module: Any = self._module()
        if module is None:
            module = self.module
        parameters = module._parameters
        weight = parameters.get("weight")  # pruned, parametrized and normed layers have none
        if (
            type(weight) in STORED
            and weight.row_major
            and type(input) is Tensor
            and type(module) is _Linear
            and not _dynamo()
            and _quiet(_questions, _kept, _owners, _names)
            and not input.is_neg()  # a part of a conjugate: its numbers are not what memory holds
            and not args
            and not kwargs
        ):
            store, bias, is_packed = weight.store, parameters["bias"], type(weight) is PackedWeight
            held = store.now if is_packed else store.half
            if held is None and weight.reclaim():
                held = store.half
            if held is not None and (bias is None or not bias.is_neg()):
                try:
                    if is_packed:
                        return packed.linear(input, held, bias)
                    return (kernels._active or kernels.active()).linear(input, held, bias)
                except (UpcastError, TypeError, RuntimeError):
                    pass  # another dtype, say: the ordinary way has a result for it, or torch's own error
        args = args if input is _MISSING else (_like(input, weight), *args)
        if _traced() or (type(module) is _Linear and _its["forward"] is _forward):
            return type(module).forward(module, *args, **kwargs)
        return bound(module)(*args, **kwargs)


def _like(input: Any, weight: Any) -> Any:
    """Return a half-precision input in float32, as it was before, for a weight that has become float32 since."""
    if type(weight) in STORED and not weight.store.held:
        resolved((weight,), {})
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or _autocast():
        return input
    halved = type(input) is Tensor and input.dtype in (torch.float16, torch.bfloat16)
    return input.float() if halved else input


def operands(linear: nn.Module) -> tuple[Operand, Tensor | None] | None:
    """Return (stored weight, float32 bias or None) of a patched ``nn.Linear`` as kernels take them, or None."""
    weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
    if not isinstance(weight, HalfWeight) or not weight.row_major or not weight.store.held:
        return None
    held = weight.operand
    return (held, bias) if bias is None or (bias.dtype == torch.float32 and not bias.is_neg()) else None


def install(root: nn.Module) -> None:
    """Give every plain ``nn.Linear`` with a HalfWeight its short forward, unless something else replaced it."""
    for module in modules(root):
        if type(module) is nn.Linear and type(module.weight) in STORED and "forward" not in module.__dict__:
            forwards.push(module, LinearForward(module))

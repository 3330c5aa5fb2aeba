"""Whether torch follows operations one by one: then they must be torch's own, or operators that torch knows.

The kernels read and write memory, and nobody sees what they do. A tracer would record nothing, a batch of torch.func
would show one of its samples or none, a tangent would be lost. What may be followed asks here first; each question
costs some tens of nanoseconds, the cheapest ones that torch has.
"""

from typing import Any

import torch
import torch.autograd.forward_ad
import torch.autograd.profiler
import torch.fx._symbolic_trace
from torch import Tensor

from upcast.core import torch_private
from upcast.kernels import native

DIRECT, OPERATORS, NESTED, TORCH = "direct", "operators", "nested", "torch"

forward_ad: Any = torch.autograd.forward_ad
profiler: Any = torch.autograd.profiler
fx: Any = torch.fx._symbolic_trace
dynamo = torch.compiler.is_dynamo_compiling  # torch.compile takes it for True, and asks no further
_exports = torch.compiler.is_compiling
jit_state = torch._C._get_tracing_state
functorch = torch._C._are_functorch_transforms_active
modes = torch._C._len_torch_dispatch_stack
_fx_traces = [] if torch_private.fx_traces is None else [torch_private.fx_traces]
_levels: Any = torch._C._functorch.get_interpreter_stack
_RULES = (torch._C._functorch.TransformType.Vmap, torch._C._functorch.TransformType.Grad)  # those `gradients` has


def questions() -> list[Any]:
    """Return what is asked of torch to know whether anything follows, but for torch.compile: see `native.quiet`."""
    return [functorch, modes, jit_state, *_fx_traces]


def flags(profiled: bool = True) -> list[tuple[dict[str, Any], str, Any]]:
    """Return what is looked at besides: where, under which name, and what is there where nothing follows.

    ``profiled``: the profiler counts.
    """
    # make_fx before dispatch is in no stack of modes
    found: list[tuple[dict[str, Any], str, Any]] = [(vars(forward_ad), "_current_level", -1)]
    if not _fx_traces:
        found.append((vars(fx), "_is_fx_tracing_flag", False))
    return [*found, (vars(profiler), "_is_profiler_enabled", False)] if profiled else found


_questions = questions()
_followed, _noted = ([list(each) for each in zip(*flags(profiled), strict=True)] for profiled in (False, True))


def active() -> bool:
    """Whether a transformation, a tracer or a mode follows what is done to tensors."""
    owners, names, kept = _followed
    return _exports() or not native.quiet(_questions, kept, owners, names)


def watched() -> bool:
    """Whether `active`, or the profiler notes what is called: the kernels may not run unseen."""
    owners, names, kept = _noted
    return dynamo() or not native.quiet(_questions, kept, owners, names)


def way() -> str:
    """Return how a kernel's work is done now.

    DIRECT: by the kernel. OPERATORS: by one of `upcast.kernels.custom_ops`. NESTED: by a rule of
    `upcast.kernels.gradients` for torch.func. TORCH: by torch's own operations, for TorchScript, for tangents, and
    where there is no rule.
    """
    if not watched():
        return DIRECT
    if _exports():  # torch.func cannot differentiate operators that are written in Python
        return TORCH if functorch() else OPERATORS
    if jit_state() is not None or forward_ad._current_level >= 0:
        return TORCH
    if functorch():
        return NESTED if all(level.key() in _RULES for level in _levels()) else TORCH
    return OPERATORS


def jit_traces() -> bool:
    """Whether torch.jit.trace records operations: loops over what only this input has would be kept as they are."""
    return jit_state() is not None


def is_old_batch(tensor: Tensor) -> bool:
    """Whether autograd gives gradients of several results at once (``is_grads_batched``), which no mode tells."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)

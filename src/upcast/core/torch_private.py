"""What upcast uses of torch's insides: looked up here once, with what stands in where a version does not have it.

A name that only tells whether a fast path may run has a stand-in that says no: the modules run unfused. One without a
stand-in is needed by the weights themselves; where it is missing, upcast does not import, and the hooks of UPCAST=1
leave programs alone with one line.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.autograd.forward_ad
import torch.autograd.profiler
import torch.fx._symbolic_trace
import torch.utils._device
import torch.utils.hooks
from torch import nn

from upcast.core.errors import UpcastError

OLDEST, NEWEST = "2.8", "2.14"  # of the versions that were run; each has all of the names

# Name under torch -> since which of the versions that upcast was ever run with.
NEEDED = {
    "_C.DisableTorchFunctionSubclass": "2.0",
    "_C._len_torch_function_stack": "2.0",
    "_C._len_torch_dispatch_stack": "2.0",
    "_C._is_any_autocast_enabled": "2.4",
    "_C._are_functorch_transforms_active": "2.0",
    "_C._functorch.get_interpreter_stack": "2.0",
    "_C._get_tracing_state": "2.0",
    "_C._nn._parse_to": "2.0",
    "_C._swap_tensor_impl": "2.3",
    "Tensor._make_wrapper_subclass": "2.0",
    "_C._autograd._unsafe_set_version_counter": "2.7",
    **dict.fromkeys(
        (
            *("_C.DispatchKey", "_C.DispatchKeySet", "_C._AutoDispatchBelowAutograd", "_C._ExcludeDispatchKeyGuard"),
            *("_C._InferenceMode", "_C._disabled_torch_function_impl", "_C._nn.linear"),
            *("_C._get_function_stack_at", "_C._pop_torch_function_stack"),
            *("_C._functorch.TransformType", "_C._functorch.is_functorch_wrapped_tensor"),
            *("_C._functorch.is_legacy_batchedtensor", "_has_compatible_shallow_copy_type"),
            *("overrides._get_current_function_mode_stack", "_guards.TracingContext", "utils._device.DeviceContext"),
            *("_C._DisableFuncTorch", "_C._functorch.peek_interpreter_stack"),
            *("utils._python_dispatch._disable_current_modes", "UntypedStorage._new_with_weak_ptr"),
        ),
        "2.8, the oldest that was asked",
    ),
}
FX_FLAG, FX_FUNCTION = "fx._symbolic_trace._is_fx_tracing_flag", "fx._symbolic_trace._get_is_fx_tracing"
FAST_PATHS = {
    "nn.modules.module._has_any_global_hook": "2.8",
    f"{FX_FLAG}|{FX_FUNCTION}": "2.0, and from 2.14 on",  # one flag for all threads, and one for each
    "autograd.forward_ad._current_level": "2.0",
    "autograd.profiler._is_profiler_enabled": "2.0",
}


def missing(names: Any) -> list[str]:
    """Return those of ``names`` that the installed torch does not have."""
    return [name for name in names if _find(name) is None]


def check() -> None:
    """Raise UpcastError where this torch has not what the weights need."""
    lacking = missing(NEEDED)
    if lacking:
        raise UpcastError(
            f"torch {torch.__version__} has no torch.{lacking[0]}; upcast was run with {OLDEST} to {NEWEST}. "
            f"Install one of them: pip install 'torch>={OLDEST}'."
        )


def why_unfused() -> str:
    """Return why no fused forward runs under this torch, or an empty string."""
    lacking = missing(FAST_PATHS)
    return f"torch {torch.__version__} has no torch.{lacking[0].partition('|')[0]}" if lacking else ""


def _find(name: str) -> Any:
    """Return what torch has under the first of these names that it has, or None."""
    for each in name.split("|"):
        try:
            return attrgetter(each)(torch)
        except AttributeError:
            continue
    return None


def _always() -> bool:
    return True


# Whether torch.fx traces: None where a flag says it, which costs less to look at (`kernels.transforms`).
fx_traces: Callable[[], bool] | None = _find(FX_FUNCTION)

# Whether someone watches the calls of all modules; where it is not known, someone may.
any_global_hook: Callable[[], bool] = getattr(nn.modules.module, "_has_any_global_hook", _always)


def hooks_so_far() -> int | None:
    """Return a number that grows with every hook on any module; None where it is not known."""
    return getattr(torch.utils.hooks.RemovableHandle, "next_id", None)


check()

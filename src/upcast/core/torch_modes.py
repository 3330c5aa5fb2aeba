"""torch's modes that must not reach what upcast makes: weights outlive the block in which a model is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def without_overrides(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, for which HalfWeights are what torch's own code sees in them.

    As within ``DisableTorchFunctionSubclass()``, but in one call: an interruption cannot leave it on.
    """
    return torch._C._disabled_torch_function_impl(function, (), args, {})


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make ordinary tensors, also where inference mode is on; gradients stay off there.

    A weight made in inference mode keeps no version, and could take part in no gradient for the rest of its life.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch._C._InferenceMode(False):  # not torch.inference_mode: Python code, which can be interrupted half-way
        torch.set_grad_enabled(False)  # until the end of the block, as the mode
        yield


@contextmanager
def unfollowed() -> Iterator[None]:
    """Make tensors that no tracer, imitation or transformation of torch has to do with."""
    if not torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    with torch._C._DisableFuncTorch(), torch.utils._python_dispatch._disable_current_modes():
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 where no dtype is asked for: a patched model computes its buffers in it."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    try:
        torch.set_default_dtype(torch.float32)
        yield
        torch.set_default_dtype(before)
    except BaseException:  # of the block, or an interruption of the line above
        torch.set_default_dtype(before)
        raise


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or in place of an inference tensor an ordinary one in the same memory."""
    if not tensor.is_inference():
        return tensor
    layout = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), *layout)


def function_modes() -> int:
    """Return how many function modes there are; those that torch put back after an interruption had ended them go."""
    depth = torch._C._len_torch_function_stack()
    while depth and getattr(torch._C._get_function_stack_at(depth - 1), "ended_by_upcast", False):
        torch._C._pop_torch_function_stack()
        depth -= 1
    return depth

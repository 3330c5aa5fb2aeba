"""What a fused forward is, whatever library its module is of.

Each is an object that a patched module carries as its ``forward``; it copies and pickles with the module. It runs the
kernels where nothing could tell the difference but the clock, and the forward of the module's class everywhere else:
while torch.compile traces, where a parameter of the module itself learns, for arguments that the kernels do not cover,
and where someone replaced what the kernels stand for.
Inner modules are called as modules, so that hooks on them see what they would see without fusion.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core import torch_private
from upcast.core.forward_override import Forward
from upcast.kernels import transforms
from upcast.kernels.block_spec import NORMS, STORAGES, Matrix, Norm
from upcast.kernels.packed_matrix import PackedMatrix
from upcast.patching.fast_linear import LinearForward, operands
from upcast.tensor import autocast
from upcast.tensor.genuine import bound, forwards, observed, originals

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused(Forward):
    """What replaces one method of ``module`` while it is patched. ``calls`` counts what really ran fused.

    It stands for the method of the class that the module had when it was made, and runs only while that is genuine.
    """

    fast = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.calls = 0
        self.kind = type(module)
        self.originals = originals(*self.stands_for(module))

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """Return what `originals` is to collect."""
        return forwards, type(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self.genuine() or observed():
            return self.unfused(*args, **kwargs)
        return self.fused(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(bound(self.module, self.method))

    def genuine(self) -> bool:
        """Whether the module is what it was, and its library's code has not been replaced."""
        return type(self.module) is self.kind and self.originals.intact()

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernels, or `unfused` where they do not cover the arguments."""
        raise NotImplementedError

    def unfused(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method as the module's class has it now."""
        module = self.module
        if torch.compiler.is_compiling():  # which follows this, but not a search
            return getattr(type(module), self.method)(module, *args, **kwargs)
        return bound(module, self.method)(*args, **kwargs)

    def free(self, x: Tensor) -> bool:
        """Whether the kernels may run for ``x``: float32 on the CPU, nothing follows, no gradient wanted."""
        if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.module.parameters())):
            return False
        return not transforms.active() and not autocast.enabled()

    def fits(self, x: Tensor) -> bool:
        """As `free`, but a gradient may be wanted through the module; none of the module's own parameters learns."""
        if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
            return False
        own = self.module._parameters.values()
        if torch.is_grad_enabled() and any(parameter is not None and parameter.requires_grad for parameter in own):
            return False
        return not transforms.active() and not autocast.enabled()


def hooked(module: nn.Module) -> bool:
    """Whether someone watches the calls of ``module`` itself."""
    state = module.__dict__
    return any(state[name] for name in _HOOKS)


def float32(vector: Any) -> bool:
    """Whether a norm's vector is as the kernels take it: nobody took it away, converted it or moved it."""
    return isinstance(vector, Tensor) and vector.dtype is torch.float32 and vector.is_cpu and not vector.is_neg()


def fuses(module: nn.Module, kind: type[Fused]) -> bool:
    """Whether ``module`` has a fused forward of that kind, and is what it was made for."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, kind) and type(module) is forward.kind


def unwatched_call(module: nn.Module) -> bool:
    """Whether nobody would see if ``module`` was not called, as its class has it, but stood for."""
    return "forward" not in module.__dict__ and not hooked(module) and not torch_private.any_global_hook()


class UnknownLayer(Exception):
    """A layer of a block that the native call for whole blocks does not know."""


def plain(module: nn.Module) -> bool:
    """Whether ``module`` runs its class's forward, or a short way to the same."""
    return isinstance(module.__dict__.get("forward"), (LinearForward, type(None)))


def matrix(linear: Any) -> Matrix:
    """Return a plain patched Linear, or none at all, as the call for whole blocks takes it.

    Raises:
        UnknownLayer: the module is something else.
    """
    if linear is None:
        return Matrix()
    held = operands(linear) if type(linear) is nn.Linear and plain(linear) else None
    if held is None:
        raise UnknownLayer
    weight, bias = held
    if isinstance(weight, PackedMatrix):
        return Matrix(weight, bias, STORAGES["packed"])
    return Matrix(weight, bias)


def rms_norm(norm: Any, kind: type[Fused], eps: str, offset: float = 0.0) -> Norm:
    """Return a norm that has a fused forward of that kind in the same way; ``eps`` names its attribute.

    Raises:
        UnknownLayer: the module is something else, or its vector is none that the kernels take.
    """
    if not fuses(norm, kind) or not float32(norm.weight):
        raise UnknownLayer
    return Norm(norm.weight, None, NORMS["rms"], getattr(norm, eps), offset)


class GatedMLP(Fused):
    """down(activation(gate(x)) * up(x)), the activation and its product in one kernel."""

    layers: tuple[str, str, str]  # what the module calls its gate, up and down

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    def fused(self, x: Tensor) -> Any:
        if not self.fits(x):
            return self.unfused(x)
        to_gate, to_up, down = (getattr(self.module, name) for name in self.layers)
        gate, up = to_gate(x), to_up(x)
        if not self.fits(gate) or not self.fits(up):  # a hook or a replaced layer gave something else
            return self.unfused(x)
        self.calls += 1
        return down(kernels.gated(gate, up, self.activation))

"""What a patched module does differently: when it is saved, loaded or converted, and the short way to its kernels."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from upcast.core import forward_override, messages
from upcast.core.forward_override import Attached
from upcast.core.module_tree import modules
from upcast.patching import fast_linear, padded_encoder, training_switch
from upcast.tensor import materialize, pickling, torchscript
from upcast.tensor.half_weight import HalfWeight, out_of_range, parameter
from upcast.tensor.packed_weight import PackedWeight, packable
from upcast.tensor.packed_weight import parameter as packed_parameter

_SCRIPT = "__prepare_scriptable__"  # what torch.jit.script asks a module, and every one inside


def install(root: nn.Module, unpatch: Callable[[nn.Module], object], *, shortcuts: bool = True) -> None:
    """Give every module that holds a HalfWeight its hooks and short ways, and ``root`` a guard on conversions.

    ``unpatch`` is what a whole model is given to before it is converted.
    """
    inside = modules(root)
    pickling.install(inside)
    for module in inside:
        if any(_half_weights(module._parameters)):
            module.register_state_dict_post_hook(_plain_state)
            module._register_load_state_dict_pre_hook(AcceptState(module))
            module.__dict__[_SCRIPT] = torchscript.refuse_script
    if shortcuts:
        fast_linear.install(root)
    training_switch.install(root)
    padded_encoder.install(root)
    root.__dict__[_SCRIPT] = torchscript.refuse_script
    for module in inside:
        module.__dict__["_apply"] = GuardedApply(module, unpatch if module is root else None)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave; short ways are forwards, and go with them."""
    inside = modules(root)
    for module in inside:
        _discard(module._state_dict_hooks, lambda hook: hook is _plain_state)
        _discard(module._load_state_dict_pre_hooks, lambda hook: isinstance(getattr(hook, "hook", hook), AcceptState))
        module.__dict__.pop(_SCRIPT, None)
        module.__dict__.pop("_apply", None)
    pickling.remove(inside)
    training_switch.remove(root)
    padded_encoder.remove(root)


def _half_weights(parameters: dict[str, Any]) -> Iterator[tuple[str, HalfWeight]]:
    for name, value in parameters.items():
        if isinstance(value, HalfWeight):
            yield name, value


def _discard(registered: dict[int, Any], ours: Callable[[Any], bool]) -> None:
    for key in [key for key, hook in registered.items() if ours(hook)]:
        del registered[key]


def _plain_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Put plain tensors of 16 bits into a state dict; with keep_vars=True the parameters themselves stay."""
    to_onnx = torchscript.exports_onnx()
    for name, weight in _half_weights(module._parameters):
        value = state.get(prefix + name)
        if isinstance(value, HalfWeight) and (to_onnx or not isinstance(value, nn.Parameter)):
            state[prefix + name] = weight.hand_out()


class AcceptState(Attached):
    """With assign=True, take over incoming tensors as stored weights; in place of float16 ones those without a copy.

    What float16 cannot hold is assigned as it is, in float32. Without assign=True, HalfWeight.copy_ does the rest.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.parameters = module._parameters  # a shallow copy that outlives the module has them too

    def __call__(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: object) -> None:
        """Change ``state`` before it is loaded."""
        if not metadata.get("assign_to_params_buffers", False):
            return
        module = self._module()
        for name, weight in _half_weights(self.parameters if module is None else module._parameters):
            value: Any = state.get(prefix + name)
            plain = isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and value.is_floating_point()
            matrix = packable(value.detach()) if plain and isinstance(weight, PackedWeight) else None
            if matrix is not None:
                state[prefix + name] = packed_parameter(matrix, value.shape, weight.fallbacks, weight.wants_grad)
            elif plain and not out_of_range(value):
                state[prefix + name] = parameter(value.detach().half(), weight.fallbacks, weight.wants_grad)
            if isinstance(state.get(prefix + name), HalfWeight):
                state[prefix + name].store.before = weight.store.before


class GuardedApply(Attached):
    """``_apply`` of a module in a patched model: what ``.half()``, ``.to(...)``, ``.share_memory()`` are made of.

    A conversion to another dtype or device is done as the program says: a whole model is unpatched first, and of a part
    of one the weights become ordinary parameters.
    """

    def __init__(self, module: nn.Module, unpatch: Callable[[nn.Module], object] | None) -> None:
        super().__init__(module)
        self.unpatch = unpatch  # of a whole model

    def __call__(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply ``function`` to the tensors of the module."""
        module = self.module
        probe = function(torch.empty(0, dtype=torch.float32, device="cpu"))
        if probe.device.type == "cpu" and probe.dtype == torch.float32:
            return _apply_to_others(module, function, recurse)
        wanted = str(probe.dtype if probe.dtype != torch.float32 else probe.device)
        if self.unpatch is not None:
            with messages.silent():
                self.unpatch(module)
            messages.say(
                f"{type(module).__name__} is converted to {wanted}, as the program says: it is not patched any more, "
                "and computes in that dtype"
            )
        for _, weight in list(_half_weights(module._parameters)):  # each module inside does its own
            materialize.materialize(weight, f"the program converts them to {wanted}")
        for each in [each for each in forward_override.kept(module) if each.fast]:
            forward_override.remove(module, each.owner)  # it is for float32
        module.__dict__.pop(_SCRIPT, None)
        training_switch.remove(module)
        return type(module)._apply(module, function, recurse)


def _apply_to_others(root: Any, function: Callable[[Tensor], Tensor], recurse: bool) -> Any:
    """Run ``root._apply`` with what `function` gives for HalfWeights written into them: torch would replace them."""
    aside = [
        (module, *item)
        for module in (modules(root) if recurse else [root])
        for item in _half_weights(module._parameters)
    ]
    try:
        for module, name, weight in aside:
            module._parameters[name] = None
            results = [function(weight)]
            if results[0] is not weight:
                weight.data = results.pop()  # which nobody else holds then
        applied = type(root)._apply(root, function, recurse)
        _put(aside)
    except BaseException:  # an interruption of putting them back as well
        _put(aside)
        raise
    return applied


def _put(weights: list[tuple[nn.Module, str, HalfWeight]]) -> None:
    for module, name, weight in weights:
        module._parameters[name] = weight  # type: ignore[assignment]  # it is a parameter, says torch too
    for module in {module for module, *_ in weights}:
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it has listed what stood there meanwhile

"""What can be patched: the module inside what users hand over, its tensors, and every reason to refuse it."""

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from upcast.core import extensions
from upcast.core.errors import UpcastError
from upcast.core.module_tree import named_modules
from upcast.core.pattern import matches
from upcast.core.tensor_ref import TensorRef
from upcast.patching import trainable as learning
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.packed_weight import PackedWeight


def refs(model: nn.Module) -> list[TensorRef]:
    """Return the parameters and buffers of ``model``, each tensor once, with all of its owners."""
    found: dict[int, TensorRef] = {}
    for prefix, module in named_modules(model):
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    ref = found.setdefault(id(tensor), TensorRef(full, tensor, is_parameter, []))
                    ref.owners.append((module, name))
    return list(found.values())


def prepare(
    model: object, keep: Sequence[str], trainable: Sequence[str] = (), *, optimizers: bool = False, loaded: bool = False
) -> tuple[nn.Module, list[TensorRef]]:
    """Return the module to patch and its tensors, after every check that can refuse it. Changes nothing.

    ``optimizers`` says that one may hold what is replaced; ``loaded``, that a loader may have packed weights.
    """
    root = unwrap(model)
    found = refs(root)
    name = type(root).__name__
    if isinstance(root, torch.jit.ScriptModule):
        raise UpcastError(
            f"this {name} is compiled by TorchScript, for the tensors that it has; it takes no others. Patch the "
            "module that it was made of, for what does not need TorchScript."
        )
    for ref in found:
        if not (loaded and isinstance(ref.tensor, PackedWeight)):
            _check_tensor(ref, name)
    check_patterns(root, found, keep, trainable)
    if not optimizers:
        _check_optimizers(found, keep)
    return root, found


def check_patterns(root: nn.Module, found: Sequence[TensorRef], keep: Sequence[str], trainable: Sequence[str]) -> None:
    """Raise UpcastError for a pattern that names nothing, and for what cannot be trained; mark what learns."""
    names = [ref.name for ref in found if ref.is_parameter]
    for kind, pattern in (*(("keep", each) for each in keep), *(("trainable", each) for each in trainable)):
        if not any(matches(each, pattern) for each in names):
            raise UpcastError(
                f"{kind} pattern {pattern!r} matches no parameter of {type(root).__name__}; a pattern names a "
                f"parameter or a module, such as {names[-1] if names else 'lm_head'!r}. See print(upcast.plan(model)) "
                "for the names."
            )
    learning.mark(root, found, trainable)
    learning.check(root, found, trainable)


def unwrap(model: object) -> nn.Module:
    """Return the module inside what users hand over: a pipeline, a library's wrapper, or the module itself."""
    for extension in extensions.registered():
        inner = extension.unwrap(model)
        if inner is not model:
            return unwrap(inner)
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise UpcastError(
            f"this {type(model).__name__} is no model; upcast patches a torch.nn.Module, or an object whose .model is "
            "one (such as a Transformers pipeline). Pass the module itself; of several, one after the other."
        )
    return unwrap(inner)


def _check_tensor(ref: TensorRef, model: str) -> None:
    tensor = ref.tensor
    if isinstance(tensor, HalfWeight):
        raise UpcastError(
            f"{model} is patched already ({ref.name} is stored in float16); a model is patched once. "
            "Call upcast.unpatch(model) first to patch it differently; or unpatch the piece, of a larger model."
        )
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise UpcastError(f"{ref.name} of {model} has no shape yet; run one forward pass first.")
    if tensor.is_meta:
        raise UpcastError(
            f"{ref.name} of {model} is on the meta device: it has no numbers to store. Load the weights first."
        )
    if tensor.device.type != "cpu":
        raise UpcastError(
            f"{ref.name} of {model} is on {tensor.device}; upcast computes on the CPU. Call model.to('cpu') first."
        )


def _check_optimizers(found: Sequence[TensorRef], keep: Sequence[str]) -> None:
    """Refuse an optimizer that holds a parameter to be replaced: it would go on with one that no model has."""
    may_be_held = _held_elsewhere([ref for ref in found if ref.is_parameter and not _stays(ref, keep)])
    replaced = {id(ref.tensor): ref for ref in may_be_held}
    for optimizer in _optimizers() if replaced else ():  # which takes a tenth of a second and more
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if id(tensor) in replaced:
                    _refuse_optimizer(replaced[id(tensor)], type(optimizer).__name__)


def _optimizers() -> list[torch.optim.Optimizer]:
    """Return every optimizer of the process.

    An object refers to its class. `gc.get_objects` would hold all that there is, also tuples that another thread is
    filling at this moment, which Python then refuses to end (SystemError).
    """
    kinds: list[type[torch.optim.Optimizer]] = [torch.optim.Optimizer]
    for kind in kinds:
        kinds += [each for each in kind.__subclasses__() if each not in kinds]
    return [each for each in gc.get_referrers(*kinds) if issubclass(type(each), torch.optim.Optimizer)]


def _held_elsewhere(refs: Sequence[TensorRef]) -> list[TensorRef]:
    """Return those whose tensor may be held by anything but the model and the ref."""
    alone = _references(TensorRef("", nn.Parameter(torch.empty(0)), True, []))
    return [ref for ref in refs if _references(ref) > alone]


def _references(ref: TensorRef) -> int:
    """Return how many references there are beside those of the modules; a shallow copy shares the original's."""
    of_modules = {(id(module._parameters), name) for module, name in ref.owners}
    return sys.getrefcount(ref.tensor) - len(of_modules)


def _stays(ref: TensorRef, keep: Sequence[str]) -> bool:
    """Whether the parameter is the same object afterwards."""
    if ref.tensor.dtype != torch.float32:
        return not ref.tensor.is_floating_point()
    kept = not ref.is_weight or ref.learns or any(matches(ref.name, pattern) for pattern in keep)
    return kept and not ref.freezes


def _refuse_optimizer(ref: TensorRef, optimizer: str) -> NoReturn:
    if not ref.tensor.requires_grad:
        raise UpcastError(
            f"a {optimizer} optimizer holds {ref.name}, which is frozen: it would keep the weight's old numbers in "
            "memory beside float16's. Build it from [p for p in model.parameters() if p.requires_grad]."
        )
    becomes = "float32, as a new parameter" if ref.learns or not ref.is_weight else "float16 and is frozen"
    raise UpcastError(
        f"{ref.name} requires grad and a {optimizer} optimizer holds it; patching stores it in {becomes}. Delete the "
        "optimizer, or patch the model before creating one for the parameters that still require grad."
    )

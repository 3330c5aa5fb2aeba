"""Which parameters learn: those stay the float32 parameters that they are, with their optimizer's state.

What requires grad learns, and what is frozen goes to float16. Every fresh module says that all of it requires grad,
and that it is in training mode, so neither says anything: such a model is for inference, and the plan says so.
"""

from collections.abc import Sequence

from torch import nn

from upcast.core import extensions
from upcast.core.errors import UpcastError
from upcast.core.module_tree import named_modules
from upcast.core.pattern import matches
from upcast.core.tensor_ref import TensorRef

_INFERENCE = (
    "inference: {share} of the weights require grad, as in every fresh model, so none is taken to learn; "
    "trainable=[...] names those that do"
)


def mark(root: nn.Module, found: Sequence[TensorRef], trainable: Sequence[str]) -> None:
    """Set ``learns`` of the refs. With patterns what matches learns, the rest freezes; else `_for_inference` decides.

    Raises:
        UpcastError: patterns that name no parameter that requires grad.
    """
    inference = not trainable and _for_inference(root, found)
    for ref in found:
        wanted = not trainable or any(matches(ref.name, pattern) for pattern in trainable)
        ref.learns = ref.is_parameter and ref.tensor.requires_grad and wanted and not inference
        ref.wants_grad = ref.is_parameter and ref.tensor.requires_grad and inference
        ref.freezes = ref.is_parameter and ref.tensor.requires_grad and not wanted
    if trainable and not any(ref.learns for ref in found):
        raise UpcastError(
            f"trainable={list(trainable)!r} leaves nothing to train in {type(root).__name__}: none of these parameters "
            "requires grad. Call requires_grad_(True) on them first, or leave trainable= out for inference."
        )


def check(root: nn.Module, found: Sequence[TensorRef], trainable: Sequence[str] = ()) -> None:
    """Raise UpcastError if all weights of the model are to be trained, or some on top of a quantized base."""
    weights = [ref for ref in found if ref.is_weight]
    if trainable and weights and all(ref.learns for ref in weights):
        raise UpcastError(
            f"trainable={list(trainable)!r} names all weights of {type(root).__name__}; small steps are lost in "
            "float16, so weights that learn stay in float32 and nothing would be stored in float16. Train it in "
            "float32; or freeze the base (requires_grad_(False)) and train adapters."
        )
    quantized = _quantized(root, found) if any(ref.learns for ref in found) else ""
    if quantized:
        raise UpcastError(
            f"{quantized} of {type(root).__name__} is quantized, and adapters are to learn on top of it; upcast trains "
            "on a base in float16, and leaves quantized weights as they are, with whatever gradients they give. Load "
            "the base without quantization; or train it without upcast."
        )


def remarks(root: nn.Module, found: Sequence[TensorRef]) -> tuple[str, ...]:
    """Return a line for the foot of the plan: how much learns, or why nothing does though it requires grad."""
    weights = [ref for ref in found if ref.is_weight]
    learning = sum(ref.tensor.numel() for ref in found if ref.learns)
    if learning:
        total = sum(ref.tensor.numel() for ref in found if ref.is_parameter)
        return (f"training: {learning:,} of {total:,} parameters learn, in float32",)
    share = _share(weights)
    if _for_inference(root, found):
        return (_INFERENCE.format(share="all" if share == 1 else f"{share:.0%}"),)
    return ()


def _quantized(root: nn.Module, found: Sequence[TensorRef]) -> str:
    """Return the name of a weight that holds integers in place of numbers, or an empty string."""
    for ref in found:
        tensor = ref.tensor
        integers = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dim() >= 2
        packed = ref.name.rpartition(".")[2] == "qweight"  # GPTQ's and AWQ's are buffers
        if (
            tensor.is_quantized
            or type(tensor).__module__.startswith("torchao")
            or (integers and (ref.is_parameter or packed))
        ):
            return ref.name
    ours = "torch.ao.nn.quantized"  # their weights are neither parameters nor buffers
    return next((name for name, module in named_modules(root) if type(module).__module__.startswith(ours)), "")


def _for_inference(root: nn.Module, found: Sequence[TensorRef]) -> bool:
    """All weights require grad; or most, in eval mode: some models freeze a table of positions and nothing else."""
    share = _share([ref for ref in found if ref.is_weight])
    return share == 1 or (share > 0.5 and not _trains(root))


def _share(weights: Sequence[TensorRef]) -> float:
    """Return which part of the numbers in the weights requires grad."""
    total = sum(ref.tensor.numel() for ref in weights)
    return sum(ref.tensor.numel() for ref in weights if ref.tensor.requires_grad) / total if total else 0.0


def _trains(root: nn.Module) -> bool:
    """Whether the model is in training mode and can learn."""
    return root.training and not any(each.only_generates(root) for each in extensions.registered())

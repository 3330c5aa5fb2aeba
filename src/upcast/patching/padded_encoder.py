"""nn.TransformerEncoder under a padding mask: what torch leaves at the padded positions.

In inference torch drops padded positions on its way through the layers, and puts zeros there behind the last one. It
does not take that way with tensors of other classes; then numbers stand there that mean nothing, and a mean over all
positions would have them in it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from upcast.core.module_tree import modules
from upcast.tensor.half_weight import HalfWeight

_is_left_aligned = getattr(torch, "_nested_tensor_from_mask_left_aligned", None)


def install(root: nn.Module) -> None:
    """Have every encoder with a HalfWeight in its first layer give what torch gives at padded positions."""
    for module in modules(root):
        if isinstance(module, nn.TransformerEncoder) and any(_stored_in_float16(module)):
            module.register_forward_hook(_zero_padding, with_kwargs=True)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    for module in modules(root):
        for key in [key for key, hook in module._forward_hooks.items() if hook is _zero_padding]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)


def _zero_padding(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    named = dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)) | kwargs
    padding, src = named.get("src_key_padding_mask"), named.get("src")
    if padding is None or named.get("mask") is not None or not _drops_padding(encoder, src, padding):
        return output
    zeros = output.new_zeros(output.shape[-1])
    left = zeros if encoder.norm is None else type(encoder.norm).forward(encoder.norm, zeros)
    return torch.where(padding.bool()[..., None], left, output)


def _drops_padding(encoder: Any, src: Any, padding: Tensor) -> bool:
    """Whether torch would drop padded positions, if all tensors were ordinary ones."""
    first = encoder.layers[0]
    if not getattr(encoder, "use_nested_tensor", False) or first.training or torch.is_autocast_enabled():
        return False
    if not torch.backends.mha.get_fastpath_enabled() or src.dim() != 3 or src.is_nested:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (src, *first.parameters())):
        return False
    if not any(_stored_in_float16(encoder)):
        return False  # it did by itself
    if not getattr(encoder, "mask_check", True):
        return True
    if torch.compiler.is_compiling() or _is_left_aligned is None:
        return False
    return bool(_is_left_aligned(src, padding.logical_not()))


def _stored_in_float16(encoder: nn.TransformerEncoder) -> list[bool]:
    return [isinstance(each, HalfWeight) for each in encoder.layers[0].parameters()]

"""nn.TransformerEncoder under a padding mask: what torch leaves at the padded positions.

In inference torch drops padded positions on its way through the layers, and puts zeros there behind the last one. It
does not take that way with tensors of other classes; then numbers stand there that mean nothing, and a mean over all
positions would have them in it. It looks at the first layer alone, so it is told not to take it: that layer may be
replaced by an ordinary one.
"""

from typing import Any

import torch
from torch import nn

from upcast.core.module_tree import modules
from upcast.tensor.half_weight import HalfWeight

_NOT_NESTED = 0  # for ``use_nested_tensor``: as false as what users may set, and told from it
_is_left_aligned = getattr(torch, "_nested_tensor_from_mask_left_aligned", None)


def install(root: nn.Module) -> None:
    """Have every encoder with a HalfWeight in a layer give what torch gives at padded positions."""
    for module in modules(root):
        if not isinstance(module, nn.TransformerEncoder) or not getattr(module, "use_nested_tensor", False):
            continue
        if any(isinstance(each, HalfWeight) for each in module.layers.parameters()):
            module.use_nested_tensor = _NOT_NESTED  # type: ignore[assignment]
            module.register_forward_hook(_zero_padding, with_kwargs=True)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    for module in modules(root):
        for key in [key for key, hook in module._forward_hooks.items() if hook is _zero_padding]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
        if _told(module):
            module.use_nested_tensor = True  # type: ignore[assignment]


def _zero_padding(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    named = dict(zip(("src", "mask", "src_key_padding_mask"), args, strict=False)) | kwargs
    if not _drops_padding(encoder, named):
        return output
    zeros = output.new_zeros(output.shape[-1])
    left = zeros if encoder.norm is None else type(encoder.norm).forward(encoder.norm, zeros)
    return torch.where(named["src_key_padding_mask"].bool()[..., None], left, output)


def _drops_padding(encoder: Any, given: dict[str, Any]) -> bool:
    """Whether torch would drop padded positions, if all tensors were ordinary ones."""
    first, padding, src = encoder.layers[0], given.get("src_key_padding_mask"), given["src"]
    if padding is None or given.get("mask") is not None or not _told(encoder):
        return False
    if first.training or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if src.dim() != 3 or src.is_nested:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in (src, *first.parameters())):
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    if torch.compiler.is_compiling() or _is_left_aligned is None:
        return False
    return bool(_is_left_aligned(src, padding.logical_not()))


def _told(module: nn.Module) -> bool:
    value = module.__dict__.get("use_nested_tensor")
    return value is not False and value == _NOT_NESTED

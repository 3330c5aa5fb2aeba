"""How the numbers of a tensor lie in memory, where they lie as no kernel expects them."""

import torch
from torch import Tensor, nn


def reach(tensor: Tensor) -> int:
    """Return how many numbers of memory a tensor spans, from its first to its last."""
    if tensor.numel() == 0:
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def bounds(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's numbers, and the one after the last."""
    return tensor.data_ptr(), tensor.data_ptr() + reach(tensor) * tensor.element_size()


def is_expanded(tensor: Tensor) -> bool:
    """Whether this is a matrix of more numbers than its memory holds: a copy could be of any size."""
    return tensor.dim() >= 2 and tensor.layout == torch.strided and tensor.numel() > reach(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the very numbers, at addresses of such numbers, and a vector's one after the other.

    It holds those of opposite sign for a part of a conjugate, and a file may put tensors at any address.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or not tensor.is_cpu:
        return True
    if tensor.is_neg() or tensor.data_ptr() % tensor.element_size():
        return False
    return tensor.dim() >= 2 or tensor.is_contiguous()


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor, or a plain copy."""
    return tensor if is_plain(tensor) else tensor.clone()


def memory(tensor: Tensor) -> Tensor:
    """Return the tensor, or of an expanded one the numbers that memory holds."""
    return tensor.as_strided((reach(tensor),), (1,)) if is_expanded(tensor) else tensor


def to_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, plain, and in no more memory than its numbers take."""
    wide = plain(memory(tensor)).float()
    return wide.as_strided(tensor.shape, tensor.stride()) if is_expanded(tensor) else wide

"""Tensors of a checkpoint bit for bit, packed or not."""

import torch
from torch import Tensor

from upcast.checkpoint import safetensors_file
from upcast.core.errors import UpcastError
from upcast.core.pages import give_back_pages
from upcast.kernels import packed
from upcast.tensor.packed_weight import PackedWeight


def numbers(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as its checkpoint has them, contiguous."""
    if not isinstance(tensor, PackedWeight):
        return tensor.detach().resolve_conj().resolve_neg().contiguous()
    matrix, dtype = tensor.store.matrix, tensor.store.before
    assert matrix is not None
    out = torch.empty(matrix.rows, matrix.columns, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    return packed.unpack(matrix, out).to(dtype).view(tensor.shape)


def born(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a tensor has in an ordinary checkpoint."""
    return tensor.store.before if isinstance(tensor, PackedWeight) else tensor.dtype


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def check_storable(name: str, tensor: Tensor) -> None:
    """Refuse what a safetensors file cannot hold."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        raise UpcastError(
            f"{name[:300]} is no dense tensor with numbers; a packed checkpoint holds such. Save the state dict with "
            "such ones."
        )
    if tensor.dtype not in safetensors_file.NAMES:
        raise UpcastError(
            f"{name[:300]} is {tensor.dtype}; a safetensors file has no such dtype. Convert it to one of 16 or 32 bits."
        )


def give_back(tensor: Tensor) -> None:
    """Tell the system that the mapped pages of a tensor are no longer needed."""
    if isinstance(tensor, PackedWeight):
        give_back_pages(tensor.blob)
    else:
        give_back_pages(tensor)

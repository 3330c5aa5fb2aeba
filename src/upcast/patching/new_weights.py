"""What takes the place of a model's tensors: rounded to float16, packed, used as they are, or upcast to float32."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from upcast.core.memory_layout import to_float32
from upcast.core.pages import Memory, give_back_pages
from upcast.core.tensor_ref import TensorRef
from upcast.core.torch_modes import ordinary
from upcast.kernels import packed
from upcast.kernels.packed_matrix import PackedMatrix
from upcast.kernels.rounding import Rounding, survey, to_half
from upcast.patching.plan import KEEP, PACKING, UPCAST
from upcast.tensor.half_weight import HalfWeight, parameter
from upcast.tensor.packed_weight import PackedWeight, as_matrix, fitting, packed_size
from upcast.tensor.packed_weight import parameter as packed_parameter
from upcast.tensor.store import Fallbacks


class NewWeights:
    """What takes the place of a model's tensors."""

    def __init__(self, model: str, storage: str, loaded: bool) -> None:
        self.fallbacks, self._storage = Fallbacks(model), storage
        self._loaded = loaded  # by us, from files: nobody has written to what is mapped
        self._memory = Memory()
        self._made: dict[str, HalfWeight] = {}
        self._half: Tensor | None = None  # of the tensor that was looked at last
        self._packed: PackedMatrix | None = None  # likewise

    def look(self, tensor: Tensor) -> Rounding:
        """Pack a tensor, or round it to float16, unless it is float16 already, and say what that loses."""
        if isinstance(tensor, PackedWeight):  # in its file
            if self._storage in PACKING and tensor.region is None:
                self._packed = tensor.store.matrix
                return Rounding(escapes=None if self._packed is None else self._packed.escapes)
            tensor = tensor.memory().contiguous()
        if self._storage not in PACKING:
            return self._round(tensor)
        found, why = fitting(tensor.detach(), self._storage)
        if found is None:
            return replace(self._round(tensor), unpacked=why)
        matrix = as_matrix(ordinary(tensor.detach()))
        blob = self._memory.empty(packed_size(tensor, found.escapes), torch.uint8)
        self._packed = packed.pack(matrix, found, blob)
        if self._loaded:
            give_back_pages(tensor)
        return Rounding(escapes=found.escapes)

    def _round(self, tensor: Tensor) -> Rounding:
        if tensor.dtype == torch.float16:
            return survey(tensor)
        self._half, rounding = to_half(tensor.detach(), self._memory)
        return rounding

    def make(self, ref: TensorRef, action: str, alias: TensorRef | None) -> Tensor | None:
        """Return the new tensor, or None for one that is kept."""
        half, self._half = self._half, None
        matrix, self._packed = self._packed, None
        if action == UPCAST:
            return _upcast(ref)
        if action == KEEP:
            plain = type(ref.tensor) is nn.Parameter
            return nn.Parameter(ref.tensor.detach(), requires_grad=False) if ref.freezes and plain else None
        shared = None if alias is None else self._made[alias.name]
        if isinstance(shared, PackedWeight):
            matrix = shared.store.matrix
        if matrix is not None:
            weight: HalfWeight = packed_parameter(matrix, tuple(ref.tensor.shape), self.fallbacks, ref.wants_grad)
        else:
            if half is None:
                half = ordinary(ref.tensor.detach()) if shared is None else shared.stored
            weight = parameter(half, self.fallbacks, ref.wants_grad)
        if shared is not None:
            weight.store.share(shared.store)
        self._made[ref.name] = weight
        return weight


def _upcast(ref: TensorRef) -> Tensor:
    held = ref.tensor.upcast() if isinstance(ref.tensor, PackedWeight) else ref.tensor
    wide = to_float32(held.detach())
    return nn.Parameter(wide, ref.tensor.requires_grad and not ref.freezes) if ref.is_parameter else wide

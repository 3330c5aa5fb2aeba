"""HalfWeights for torch.export: the program keeps them as they are, and opens them with an operator.

Exporting traces a model on imitations of its tensors. In the imitation of a HalfWeight a look at ``stored`` is an
operation of its own, ``upcast::stored``, so that the program has it between a parameter and the products; of a
PackedWeight a look at its bytes, ``upcast::packed_bytes``. The decompositions that come before lowering replace both by
the tensor inside.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from upcast.core.errors import UpcastError
from upcast.kernels.packed_matrix import PackedMatrix
from upcast.tensor.half_weight import OTHERWISE, HalfWeight
from upcast.tensor.packed_weight import PackedStore, PackedWeight, packable
from upcast.tensor.store import Fallbacks, Region
from upcast.tensor.view_ops import handles


@torch.library.custom_op("upcast::stored", mutates_args=())
def stored(weight: Tensor) -> Tensor:
    """Return the float16 tensor inside ``weight``, a HalfWeight of any shape; every HalfWeight answers this itself.

    A program that was saved and loaded has ordinary float32 parameters with numbers of float16: those are rounded once.
    """
    known: tuple[int, Tensor] | None = getattr(weight, "_upcast_stored", None)
    version = -1 if weight.is_inference() else weight._version
    if known is None or known[0] != version:
        half = weight.half()
        if not torch.equal(half.float(), weight):
            raise UpcastError(
                f"upcast::stored of a {type(weight).__name__} with numbers that float16 does not have; it opens "
                "weights that are stored in float16. Give the exported program the weights that it was exported with."
            )
        known = weight._upcast_stored = version, half  # type: ignore[attr-defined]
    return known[1]


@handles(torch.ops.upcast.stored.default)
def _stored(weight: HalfWeight) -> Tensor:
    return weight.stored


class ImitatedWeight(HalfWeight):
    """A HalfWeight without numbers, in whose place torch.export records what is done."""

    @property
    def imitated(self) -> Any:
        """What stands for the float16 tensor."""
        return self.store.half

    @property
    def stored(self) -> Any:
        """The imitated float16 tensor; while operations are recorded, as the result of one."""
        if get_proxy_mode() is None:
            return self.imitated
        with torch._C.DisableTorchFunctionSubclass():
            return torch.ops.upcast.stored(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.upcast.stored.default:
            return args[0].imitated
        return super().__torch_dispatch__(func, types, args, kwargs)


def around(inner: Tensor) -> HalfWeight:
    """Return a HalfWeight around ``inner``, which torch may have imitated.

    torch.compile, whose imitations know their place in a program already, gets an ordinary HalfWeight.
    """
    return ImitatedWeight(inner) if _is_for_export(inner) else HalfWeight(inner)


def _is_for_export(inner: Tensor) -> bool:
    compiles = torch._guards.TracingContext.try_get() is not None and not torch.compiler.is_exporting()
    return isinstance(inner, FakeTensor) and not compiles


# --- packed weights ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("upcast::packed_bytes", mutates_args=())
def packed_bytes(weight: Tensor, size: int) -> Tensor:
    """Return the bytes (uint8, (size,)) of ``weight``, a PackedWeight; every PackedWeight answers this itself.

    A program that was saved and loaded has ordinary parameters with numbers of bfloat16: those are packed once.
    """
    known: tuple[int, Tensor] | None = getattr(weight, "_upcast_packed", None)
    version = -1 if weight.is_inference() else weight._version
    if known is None or known[0] != version:
        known = weight._upcast_packed = version, _of_that_size(packable(weight.detach()), size)  # type: ignore[attr-defined]
    return known[1]


def _of_that_size(matrix: PackedMatrix | None, size: int) -> Tensor:
    """Return the bytes of ``matrix``; their size says how many escapes there are, which a program has in its graph."""
    if matrix is None or matrix.nbytes != size:
        raise UpcastError(
            "upcast::packed_bytes of a weight with other numbers than the program was exported with; their bytes would "
            "have another form. Export the model again."
        )
    return matrix.blob


@handles(torch.ops.upcast.packed_bytes.default)
def _packed_bytes(weight: PackedWeight, size: int) -> Tensor:
    return _of_that_size(weight.store.now, size)


class ImitatedStore(PackedStore):
    """The bytes of a PackedWeight without numbers; while operations are recorded, as the result of one."""

    weight: "weakref.ref[PackedWeight]"

    @property
    def now(self) -> PackedMatrix | None:
        """The matrix, with the recorded bytes."""
        matrix, weight = self.matrix, self.weight()
        if matrix is None or weight is None or get_proxy_mode() is None:
            return matrix
        with torch._C.DisableTorchFunctionSubclass():
            return matrix._replace(blob=torch.ops.upcast.packed_bytes(weight, matrix.nbytes))


class ImitatedPackedWeight(PackedWeight):
    """A PackedWeight without numbers, in whose place torch.export records what is done."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.upcast.packed_bytes.default:
            return args[0].store.matrix.blob
        return super().__torch_dispatch__(func, types, args, kwargs)


def around_packed(matrix: PackedMatrix, shape: tuple[int, ...], region: Region | None) -> PackedWeight:
    """Return a PackedWeight of ``matrix``, whose bytes torch may have imitated."""
    if not _is_for_export(matrix.blob):
        return PackedWeight(PackedStore(matrix, shape, Fallbacks()), region)
    store = ImitatedStore(matrix, shape, Fallbacks())
    weight = ImitatedPackedWeight(store, region)
    store.weight = weakref.ref(weight)
    return weight


OTHERWISE["unflatten"], OTHERWISE["unflatten packed"] = around, around_packed

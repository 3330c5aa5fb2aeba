"""Operations that no handler knows see a float32 copy of a HalfWeight, whole and counted; writes are written back.

What would look at a weight's memory, or record a gradient in it, makes it an ordinary float32 tensor first.
"""

import sys
import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree

from upcast.core.errors import UpcastError
from upcast.tensor import materialize
from upcast.tensor.half_weight import OTHERWISE, HalfWeight, resolved

_AUGMENTED = {torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.mul_, torch.Tensor.div_}  # += and its like
_references: list[
    int
] = []  # how many such a call itself holds: the first one, in `upcast.tensor.memory_ops`, has no others


def call_upcast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with a counted float32 copy of every HalfWeight; in-place results are written back.

    What looks at a weight's memory (a view that no handler knows), or would record a gradient in it, makes it an
    ordinary float32 tensor first.
    """
    copies = _Copies(str(getattr(func, "__name__", func)))
    if str(getattr(func, "__module__", "")).startswith("torch.distributed"):
        return _collective(func, args, kwargs, copies)
    result = func(*copies.upcast(args), **copies.upcast(kwargs))
    if copies.augmented(func, result):
        return result
    needed = copies.memory_needed_by(result)
    if needed:
        for weight in needed:
            materialize.dissolve(weight, materialize.MEMORY)
        return call_upcast(func, *resolved(args, kwargs))
    return copies.write_back(result)


def _collective(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], copies: "_Copies") -> Any:
    """Run a collective on float32 copies and wait for it; what may arrive later arrives in float32 memory."""
    if "recv" in func.__name__:
        return call_in_memory(func, args, kwargs)
    result = func(*copies.upcast(args), **copies.upcast(kwargs))
    if hasattr(result, "wait"):
        result.wait()
    return copies.write_back(result, (args, kwargs))


def dispatch_upcast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `call_upcast`, for an operator: its schema says what it writes, and nothing can be exchanged any more."""
    if func.namespace == "c10d":
        raise UpcastError(
            f"{func} on a weight stored in float16, from inside torch.distributed; what it writes would be lost. Give "
            "it weight.detach().clone(), and copy the result back."
        )
    copies = _Copies(str(getattr(func, "__name__", func)))
    result = func(*copies.upcast(args), **copies.upcast(kwargs))
    return copies.write_back(result, _written(func, args, kwargs))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator writes into."""
    named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    marked = [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]
    return [named[name] for name in marked if name in named]


def call_in_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func``, which needs or shares memory, after every HalfWeight has become an ordinary float32 tensor."""

    def materialized(weight: HalfWeight) -> HalfWeight:
        materialize.materialize(weight, materialize.MEMORY)
        return weight

    args, kwargs = pytree.tree_map_only(HalfWeight, materialized, (args, kwargs))
    return func(*args, **kwargs)


class _Copies:
    """The float32 copies that stand for HalfWeights in one call."""

    def __init__(self, operation: str) -> None:
        self._operation = operation
        self._pairs: dict[int, tuple[HalfWeight, torch.Tensor, int]] = {}  # weight, copy, its version before

    def upcast(self, values: Any) -> Any:
        """Return ``values`` with a float32 copy in place of each HalfWeight, the same for the same one."""
        return pytree.tree_map_only(HalfWeight, self._copy, values)

    def _copy(self, weight: HalfWeight) -> torch.Tensor:
        if not weight.store.held:  # dissolved: then this is no copy, and what is written arrives
            return materialize.alias(weight)
        if id(weight) not in self._pairs:
            weight.fallbacks.count(self._operation, weight.numel())
            with torch.inference_mode(False):  # inference tensors keep no version, and the version tells of writes
                stored = weight.stored
                wide = torch.empty_like(stored, dtype=torch.float32).copy_(stored)
            self._pairs[id(weight)] = (weight, wide, wide._version)
        return self._pairs[id(weight)][1]

    def augmented(self, func: Any, result: Any) -> bool:
        """Whether this was ``layer.weight.data += x``, with a gradient through x, and nobody else holds ``.data``.

        The numbers are written back then; what was computed is about to be assigned to ``.data``.
        """
        if func not in _AUGMENTED or len(self._pairs) != 1:
            return False
        ((weight, wide, _),) = self._pairs.values()
        held = sys.getrefcount(weight)
        if not _references:
            _references.append(held)
        shared = isinstance(weight, torch.nn.Parameter) or held > _references[0]
        if wide is not result or not wide.requires_grad or shared:
            return False
        weight.overwrite(wide, update=True)
        weight.store.written = weakref.ref(wide)
        return True

    def memory_needed_by(self, result: Any) -> list[HalfWeight]:
        """Return the weights of which ``result`` holds a view, or a record of gradients."""
        owners = {_storage_of(wide): weight for weight, wide, _ in self._pairs.values() if wide.numel()}
        owners.pop(0, None)  # under torch.func there is none
        known = {id(wide) for _, wide, _ in self._pairs.values()}
        found = [weight for weight, wide, _ in self._pairs.values() if wide.requires_grad]
        for leaf in pytree.tree_leaves(result) if owners else ():
            if isinstance(leaf, torch.Tensor) and id(leaf) not in known and leaf.layout == torch.strided:
                owner = owners.get(_storage_of(leaf))
                found += [] if owner is None else [owner]
        return found

    def write_back(self, result: Any, written: Any = ()) -> Any:
        """Write back what was written into copies, and return ``result`` with weights in place of them.

        ``written``: arguments of which it is known; of the others their version tells.
        """
        known = {id(each) for each in pytree.tree_leaves(written)}
        for weight, wide, version in self._pairs.values():
            if wide._version != version or id(weight) in known:
                _write_back(weight, wide)
        originals = {id(wide): weight for weight, wide, _ in self._pairs.values()}
        if isinstance(result, torch.Tensor):
            return originals.get(id(result), result)
        if type(result) in (list, tuple):
            return type(result)(originals.get(id(each), each) for each in result)
        return result


def _storage_of(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor.untyped_storage()._cdata


def _write_back(weight: HalfWeight, wide: torch.Tensor) -> None:
    if wide.shape != weight.shape:  # resized, by out= say
        materialize.materialize(weight, materialize.MEMORY)
        weight.data = wide
    else:
        weight.overwrite(wide, update=True)


OTHERWISE.update(function=call_upcast, operator=dispatch_upcast)

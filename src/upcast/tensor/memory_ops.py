"""What asks for a weight's memory, writes into it, or wants its gradient.

Bytes at rest are told to whoever reports memory. Writes are rounded to float16. Whatever needs float32 bytes, shares
memory, or trains makes the weight an ordinary float32 tensor (`upcast.tensor.materialize`).
"""

import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from upcast.core import extensions
from upcast.core.errors import UpcastError
from upcast.tensor import materialize
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.store import Store, uses
from upcast.tensor.upcasting import call_in_memory
from upcast.tensor.view_ops import accessor, handles, handles_each, named

# --- memory -----------------------------------------------------------------------------------------------------------


@handles_each(
    *(Tensor.element_size, Tensor.is_shared, Tensor.is_pinned),
    *(accessor("nbytes").__get__, accessor("itemsize").__get__),
)
def _at_rest(function: Any, weight: HalfWeight, *args: Any) -> Any:
    """The bytes at rest are what reports of memory want to know."""
    return weight.at_rest(function, *args)


@handles(accessor("dtype").__get__)
def _dtype(weight: HalfWeight) -> torch.dtype:
    if torch.compiler.is_compiling():
        return torch.float32
    return torch.float16 if extensions.reports_sizes(sys._getframe(2)) else torch.float32


@handles_each(
    *(Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__),
    *(Tensor.set_, Tensor.resize_, Tensor.resize_as_, Tensor._typed_storage, torch.resize_as_),
    *named("as_strided as_strided_"),
    *(Tensor.squeeze_, Tensor.unsqueeze_, Tensor.t_, Tensor.transpose_, Tensor.swapaxes_, Tensor.swapdims_),
)
def _in_memory(function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Whoever asks for the bytes gets float32's: the weight becomes an ordinary tensor."""
    if isinstance(weight, HalfWeight) and (_traced() or _imitates(sys._getframe(2))):
        with torch._C.DisableTorchFunctionSubclass():
            return function(weight, *args, **kwargs)
    return call_in_memory(function, (weight, *args), kwargs)


def _traced() -> bool:
    return torch._guards.TracingContext.try_get() is not None


def _imitates(caller: types.FrameType) -> bool:
    """Whether torch asks because it imitates the wrapper and what is inside, for torch.compile or torch.export."""
    return caller.f_globals.get("__name__") == "torch._subclasses.meta_utils"


# --- writes -----------------------------------------------------------------------------------------------------------


@handles(Tensor.copy_)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, HalfWeight):
        assert isinstance(source, HalfWeight)
        return target.copy_(source.stored, non_blocking)
    if torch.is_grad_enabled() and source.requires_grad:  # the target becomes a part of the graph
        return call_in_memory(Tensor.copy_, (target, source, non_blocking), {})
    loads = sys._getframe(2).f_globals.get("__name__") == "torch.nn.modules.module"
    return target.overwrite(source, update=not loads)


@handles(accessor("data").__set__)
def _set_data(target: Tensor, source: Tensor) -> None:
    """Take over the numbers of a tensor that nobody else holds; share the memory of any other, as torch does.

    What only a local variable held is gone by the next use. In a model that was in half precision the numbers are
    stored in float16 then; a float32 model keeps all their digits.
    """
    if isinstance(target, HalfWeight):
        if isinstance(source, HalfWeight) and (source.store, source.region) == (target.store, target.region):
            return
        written = target.store.written
        if written is not None and written() is source:
            return
        if _takes_over(target, source):
            if _alone(source):
                target.overwrite(source, update=True)
                return
            if target.store.before != torch.float32 and type(target.store) is Store:
                target.store = target.store.borrowing(source.detach())
                return
    call_in_memory(accessor("data").__set__, (target, source), {})


def _takes_over(target: HalfWeight, source: Tensor) -> bool:
    """Whether the numbers of ``source`` can stand in place of those of ``target`` and go into float16 by and by."""
    plain = type(source) is Tensor and source.dtype == torch.float32 and source.layout == torch.strided
    return plain and source.shape == target.shape and target.region is None


_references: list[int] = []  # how many a call holds to a source that nobody else has: measured below, by the first call


def _alone(tensor: Tensor) -> bool:
    """Whether nothing but the running call holds the tensor, or its memory."""
    held = sys.getrefcount(tensor)
    if not _references:
        _references.append(held)
    return held <= _references[0] and tensor._base is None and uses(tensor) == 1


def _measure_references() -> None:
    """Do both what `_alone` and ``+=`` ask about, with tensors that nobody else holds."""
    weight = HalfWeight(torch.zeros(1, 1, dtype=torch.float16))
    weight.data = torch.zeros(1, 1)
    weight.data += torch.zeros(1, 1)


_measure_references()


@handles_each(Tensor.apply_, Tensor.map_, Tensor.map2_)
def _by_a_function(function: Any, target: Tensor, *args: Any) -> Tensor:
    """What a function of Python's writes, number by number: no version tells of that."""
    plain = [each.upcast() if isinstance(each, HalfWeight) else each for each in (target, *args)]
    written: Tensor = function(*plain)
    return target.overwrite(written, update=True) if isinstance(target, HalfWeight) else written


@handles(accessor("_version").__get__)
def _version(weight: HalfWeight) -> int:
    """How often the memory was written; whoever keeps what was made of a weight asks for it."""
    memory = weight.store.bytes
    if memory is None or memory.is_inference() or _traced() or _imitates(sys._getframe(2)):
        with torch._C.DisableTorchFunctionSubclass():
            return weight._version
    return weight.store.written_times()


@handles(Tensor.share_memory_)
def _share_memory(weight: HalfWeight) -> HalfWeight:
    if weight.wants_grad:  # another process may train it, and this one wants to see that
        return call_in_memory(Tensor.share_memory_, (weight,), {})  # type: ignore[no-any-return]
    weight.store.unshare()
    if weight.store.bytes is not None:
        weight.store.bytes.share_memory_()
    return weight


# --- gradients --------------------------------------------------------------------------------------------------------


@handles(accessor("requires_grad").__get__)
def _asks_requires_grad(weight: HalfWeight) -> bool:
    if _traced() or _imitates(sys._getframe(2)):
        return False  # nothing is recorded for it
    _begin_training(weight, sys._getframe(2))
    return weight.wants_grad if isinstance(weight, HalfWeight) else weight.requires_grad


@handles(accessor("is_leaf").__get__)
def _is_leaf(weight: HalfWeight) -> bool:
    _begin_training(weight, sys._getframe(2))
    return True


def _begin_training(weight: HalfWeight, caller: types.FrameType) -> None:
    why = materialize.trainer(caller) if weight.wants_grad else None
    if why is not None:
        materialize.materialize(weight, why)


@handles(Tensor.requires_grad_)
def _requires_grad(weight: HalfWeight, requires_grad: bool = True) -> HalfWeight:
    _switch(weight, requires_grad, sys._getframe(2))
    return weight


@handles(accessor("requires_grad").__set__)
def _set_requires_grad(weight: HalfWeight, requires_grad: bool) -> None:
    _switch(weight, requires_grad, sys._getframe(2))


def _switch(weight: HalfWeight, requires_grad: bool, caller: types.FrameType) -> None:
    """What the program says shall learn becomes an ordinary parameter at once, whether it was frozen or not.

    So does what ``torch.nn.Parameter(weight)`` was made from: it asks of `detach` that both are of one type.
    """
    source, same = weight.source, weight.wants_grad and requires_grad
    begins = requires_grad and not (source is not None and source.wants_grad) and not (same and _hands_over(caller))
    weight.wants_grad = requires_grad
    if begins:
        if isinstance(source, torch.nn.Parameter):
            weight._is_param = True
        for each in (weight, source):
            if each is not None:
                materialize.materialize(each, materialize.GRADIENT)


def _hands_over(caller: types.FrameType) -> bool:
    """Whether torch gives a weight what another one's requires_grad says, as ``load_state_dict(assign=True)`` does."""
    module = str(caller.f_globals.get("__name__", ""))
    return module.startswith("torch.") and caller.f_code.co_name != "requires_grad_"


@handles_each(Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook)
def _asks_for_its_gradient(function: Any, weight: HalfWeight, *args: Any) -> Any:
    if weight.wants_grad:
        materialize.materialize(weight, materialize.GRADIENT)
    with torch._C.DisableTorchFunctionSubclass():
        return function(weight, *args)


@handles(accessor("grad").__get__)
def _grad(weight: HalfWeight) -> None:
    """No gradient goes into float16; nobody shall take that for a gradient that is not there."""
    if weight.fallbacks.missed_gradient and materialize.uses_gradients(sys._getframe(2)):
        raise UpcastError(
            "the gradient of a weight stored in float16 was not computed: nothing had said that the weight learns. "
            "Give the parameters to an optimizer, or call model.train(), before the forward pass; or name what learns "
            "with upcast.patch(model, trainable=[...])."
        )


@handles(accessor("grad").__set__)
def _set_grad(weight: HalfWeight, gradient: Tensor | None) -> None:
    if gradient is not None:
        call_in_memory(accessor("grad").__set__, (weight, gradient), {})


@handles(torch.autograd.grad)
def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(each, HalfWeight) for each in tree_leaves((outputs, inputs))):
        raise UpcastError(
            "torch.autograd.grad with respect to a weight stored in float16; nothing was recorded for it. Call "
            "weight.requires_grad_(True) before the forward pass, or keep the weight in float32 with keep=[...]."
        )
    return torch.autograd.grad(outputs, inputs, *args, **kwargs)

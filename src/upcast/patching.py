"""patch, unpatch, patched: what becomes of a model's tensors. What changes it is `upcast.transaction`."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from upcast import (
    console,
    fingerprint,
    kernels,
    learning,
    mapped,
    overwriting,
    pieces,
    tracking,
    transaction,
)
from upcast import policy as policies
from upcast.claims import alone
from upcast.errors import UpcastError
from upcast.half_weight import OURS, HalfWeight, parameter
from upcast.huge_pages import Memory
from upcast.integrations import litgpt_fused
from upcast.layout import to_float32
from upcast.modes import ordinary, outside_inference_mode
from upcast.parts import RECORD, Part, parts_of, patched_parts_of, roots_of, took_back
from upcast.planning import KEEP, WIDEN, Change, Plan, change_of, remarks, settle
from upcast.policy import Policy
from upcast.rounding import Rounding, survey, to_half
from upcast.slot import Slot
from upcast.store import Fallbacks
from upcast.targets import check_patterns, prepare, slots, unwrap
from upcast.tracking import Selection
from upcast.transaction import Places, Record, places, take_back

Model = TypeVar("Model")
Choice = str | Path | Policy | object


def patch(
    model: Model,
    *,
    policy: Choice = "safe",
    keep: Sequence[str] = (),
    kv_cache: str | None = None,
    guard: bool = False,
    heal: bool = False,
    trainable: Sequence[str] = (),
) -> Model:
    """Store the weights of ``model`` in float16 and compute in float32. In place; returns the same object.

    Weights (parameters of two dimensions and more) are rounded to nearest float16; those that are float16 already are
    used as they are, without a copy. Vectors and half-precision buffers become float32. A weight with a value beyond
    65504, or one that is not finite, stays in float32. The weights are frozen: gradients flow through, not into them.
    Where some weights are frozen and others require grad, as with adapters, those that require grad stay the float32
    parameters that they are: an optimizer that holds them goes on.
    While it works, up to float32's and float16's bytes exist side by side; `upcast.load_litgpt` avoids that.

    Args:
        model: any module on the CPU; a litgpt ``LLM``, a Fabric-wrapped module, a Transformers model or pipeline.
        policy: which op classes run in float32: ``"safe"`` (all of them), ``"sensitive"``, ``"none"``, any other policy
            string, an `upcast.Policy`, what `upcast.search` returned, or the path of a saved one.
        keep: patterns of parameter or module names to hold in float32 (``*`` and ``?`` as in file names).
        kv_cache: how keys and values are kept, by a LitGPT model unless ``set_kv_cache`` is given a dtype, and by
            Transformers': ``"float16"`` (half the bytes; a layer whose keys or values are too large for it goes to
            float32, and says so; now and then a sampled token differs) or ``"float32"``. None: the policy's.
        guard: raise an UpcastError that names the first module and operation when the result is not finite; in
            training also when the loss or a gradient is not, and with the step. The gradient of the result is held
            until the backward pass ends.
        heal: under a policy other than safe, when the result is not finite, upcast the smallest set of op classes that
            cures it, run the step again, say so, and go on with that set.
        trainable: patterns of what learns, of the parameters that require grad; the others are frozen. Without it, all
            that require grad learn, unless most of the model does: that is taken for inference, and the plan says so.

    Raises:
        UpcastError: not a module, on another device, patched already, in use by an optimizer, everything or nothing to
            train under ``trainable``, an unknown policy, pattern or kv_cache, a saved policy for another architecture,
            another thread at work on it. Nothing has been changed then, nor when it is interrupted before it is whole.
    """
    root = unwrap(model)
    record = alone([root], lambda: _patch(*_prepared(root, policy, keep, kv_cache, trainable), guard=guard, heal=heal))
    console.say(_summary(record), record.plan)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: weights and vectors return to their original dtype, hooks and marks go. Returns ``model``.

    Of a model that is composed of several, all parts that are patched; of a piece of a patched model, that piece.
    Weights that were float16 keep their storage, without a copy. What rounding to float16 lost stays lost (and is
    said); use `patched` to get the original numbers back. Interrupted, the model is patched or unpatched, never half.

    Raises:
        UpcastError: the model is not patched, or another thread is at work on it.
    """
    alone(roots_of(model).values(), lambda: _unpatch(model))
    return model


def _unpatch(model: object) -> None:
    if (took_back(model) and not parts_of(model)) or pieces.unpatch(model):
        return
    found = patched_parts_of(model)
    with outside_inference_mode():
        transaction.unpatch([part.module for part in found], *_restored_places(roots_of(model).values(), found))
    for part in found:
        console.say(_loss(part.record.plan))


def _restored_places(roots: Iterable[nn.Module], parts: Sequence[Part]) -> tuple[Places, Places]:
    """Return the tensors as they were before the patch, and those that are there now.

    For every place that holds them, also where parts share them.
    """
    held = {id(slot.tensor): slot for root in roots for slot in slots(root)}
    done: set[int] = set()
    restored, present = Places(), Places()
    for slot, record in ((slot, part.record) for part in parts for slot in slots(part.module)):
        tensor = None if id(slot.tensor) in done else _restored(slot, record)
        if tensor is not None:
            done.add(id(slot.tensor))  # it lives as long as ``held`` does
            restored += _places(held[id(slot.tensor)], tensor)
            present += places(held[id(slot.tensor)], slot.tensor)
    return restored, present


@contextmanager
def patched(
    model: Model, *, policy: Choice = "safe", keep: Sequence[str] = (), kv_cache: str | None = None
) -> Iterator[Model]:
    """Patch ``model`` for a ``with`` block; afterwards its original tensors are back, bit for bit.

    The originals stay in memory for that time, and come back wherever the block is interrupted. Arguments and errors as
    for `patch`.
    """
    with borrowed(model, policy=policy, keep=keep, kv_cache=kv_cache) as record:
        console.say(_summary(record), record.plan)
        yield model


@contextmanager
def borrowed(
    model: object, *, policy: Choice, keep: Sequence[str] = (), kv_cache: str | None = None, trial: bool = False
) -> Iterator[Record]:
    """As `patched`, without a word; yields the record.

    A trial runs forward passes and nothing else: an optimizer that holds the parameters does not matter then, because
    they come back before it can step.
    """
    root, originals, entered = unwrap(model), Places(), False
    try:
        record = alone(
            [root], lambda: _patch(*_prepared(root, policy, keep, kv_cache, trial=trial), originals=originals)
        )
        entered = True
        yield record
        _give_back(root, originals)
    except BaseException:  # of the block, or an interruption of the way in or back
        if entered or _is_lent(root, originals):
            _give_back(root, originals)
        raise


def _give_back(root: nn.Module, originals: Places) -> None:
    """Put back what was borrowed; where another thread is at work on it, after that."""
    alone([root], lambda: take_back(root, originals), waits=True)


def _is_lent(root: nn.Module, originals: Places) -> bool:
    record = root.__dict__.get(RECORD)
    return isinstance(record, Record) and record.lent is originals


def is_patched(module: nn.Module) -> bool:
    """Whether this module itself was given to `patch` (not one around or inside it)."""
    record = module.__dict__.get(RECORD)
    return isinstance(record, Record) and record.settle(module)


def record_of(root: nn.Module) -> Record:
    """Return what `patch` noted on ``root``; raise UpcastError when it is not patched."""
    record = root.__dict__.get(RECORD)
    if isinstance(record, Record) and record.settle(root):
        return record
    pieces.refuse(root)
    inner = next(iter(parts_of(root)), None)
    remedy = f"Its module {inner.name!r} is: pass that one." if inner else "Call upcast.patch(model) first."
    raise UpcastError(f"this {type(root).__name__} is not patched by upcast; only a patched model can be. {remedy}")


def report(model: object) -> str:
    """Return what `patch` did to ``model`` and what has happened since, as text to print.

    A table of its tensors, the kernels in use, and every operation that needed a whole float32 copy of a weight, with
    the number of calls and the largest copy in bytes. Of a model that is composed of several, one for each part that
    is patched, by its name.

    Raises:
        UpcastError: the model is not patched, or another thread is at work on it.
    """
    took_back(model)
    return alone(roots_of(model).values(), lambda: _report(model), reads=True)


def _report(model: object) -> str:
    return pieces.report(model) or "\n\n".join(
        f"{part.name}: {_report_of(part.record)}".removeprefix(": ") for part in patched_parts_of(model)
    )


def _report_of(record: Record) -> str:
    lines = [f"policy: {record.policy}", f"kernels: {kernels.describe()}", f"widened whole: {record.fallbacks}"]
    for why, (count, size) in record.fallbacks.dissolved.items():
        lines.append(f"float32 since then: {count} weights, {console.megabytes(size)}, because {why}")
    return "\n".join([str(record.plan), *lines])


def adopt(
    root: nn.Module,
    roundings: Mapping[str, tuple[torch.dtype, Rounding]],
    kv_cache: str | None,
    policy: Choice = "safe",
    guard: bool = False,
    heal: bool = False,
    keep: Sequence[str] = (),
    trainable: Sequence[str] = (),
) -> Record:
    """Patch a model whose loader rounded some weights, of which it knows name -> (original dtype, what was lost)."""
    for name, tensors in mapped.hold(root):
        overwriting.watch(name, tensors)
    record = alone(
        [root], lambda: _patch(*_prepared(root, policy, keep, kv_cache, trainable), roundings, guard=guard, heal=heal)
    )
    console.say(_summary(record), record.plan)
    return record


def check(root: nn.Module, policy: Choice, keep: Sequence[str] = (), trainable: Sequence[str] = ()) -> None:
    """Raise what `adopt` would of a model whose weights a loader is about to read, where that can be known by then."""
    kernels.active()
    check_patterns(root, slots(root), keep, trainable)
    tracking.check(root, policies.resolve(policy, check=functools.partial(fingerprint.check, root, loaded=False)))


def _prepared(
    model: object,
    policy: Choice,
    keep: Sequence[str],
    kv_cache: str | None,
    trainable: Sequence[str] = (),
    *,
    trial: bool = False,
) -> tuple[nn.Module, list[Slot], list[str], Policy]:
    """Return the module to patch, its tensors, what to keep and the policy, after every check that can refuse them."""
    kernels.active()  # an impossible choice is refused before anything changes
    if kv_cache is not None:
        litgpt_fused.check(kv_cache)
    policies.resolve(policy)
    took_back(model)
    root, found = prepare(model, keep, trainable, optimizers=trial)
    chosen = policies.resolve(policy, check=functools.partial(fingerprint.check, root))
    tracking.check(root, chosen)
    if kv_cache is not None:
        chosen = replace(chosen, kv_cache=kv_cache)
    return root, found, [*keep, "*"] if chosen.storage == "float32" else [*keep], chosen


class _Weights:
    """What takes the place of a model's tensors."""

    def __init__(self, model: str) -> None:
        self.fallbacks = Fallbacks(model)
        self._memory = Memory()
        self._made: dict[str, HalfWeight] = {}
        self._half: Tensor | None = None  # of the tensor that was looked at last

    def look(self, tensor: Tensor) -> Rounding:
        """Round a tensor to float16, unless it is float16 already, and say what that loses."""
        if tensor.dtype == torch.float16:
            return survey(tensor)
        self._half, rounding = to_half(tensor.detach(), self._memory)
        return rounding

    def make(self, slot: Slot, action: str, twin: Slot | None) -> Tensor | None:
        """Return the new tensor, or None for one that is kept."""
        half, self._half = self._half, None
        if action == WIDEN:
            return _widened(slot)
        if action == KEEP:
            return None
        if twin is not None:
            half = self._made[twin.name].stored
        elif half is None:
            half = ordinary(slot.tensor.detach())
        weight = parameter(half, self.fallbacks, slot.wants_grad)
        if twin is not None:
            weight.store.share(self._made[twin.name].store)
        self._made[slot.name] = weight
        return weight


@outside_inference_mode()
def _patch(
    root: nn.Module,
    found: Sequence[Slot],
    keep: Sequence[str],
    policy: Policy,
    known: Mapping[str, tuple[torch.dtype, Rounding]] | None = None,
    *,
    originals: Places | None = None,
    guard: bool = False,
    heal: bool = False,
) -> Record:
    """Patch ``root``, all or nothing; what is replaced comes into ``originals`` as well, before it is."""
    weights, tensors, lent = _Weights(type(root).__name__), Places(), originals
    originals = Places() if originals is None else originals
    changes: dict[str, Change] = {}
    for slot, action, reason, rounding, twin in settle(found, keep, weights.look):
        new = weights.make(slot, action, twin)
        if new is not None:
            tensors += _places(slot, new)
            originals += places(slot, slot.tensor)
        change = change_of(slot, action, reason, rounding)
        if known and slot.name in known:
            dtype, lost = known[slot.name]
            change = replace(change, dtype=dtype, rounding=lost, bytes_before=slot.tensor.numel() * dtype.itemsize)
        changes[slot.name] = change
        if isinstance(new, HalfWeight):
            new.store.before = change.dtype
    plan = Plan(type(root).__name__, tuple(changes.values()), learning.remarks(root, found) + remarks(root))
    selection = None if policy.everywhere else Selection(policy)
    record = Record(plan, weights.fallbacks, policy, selection, lent=lent)
    transaction.patch(root, record, tensors, originals, guard, heal)
    return record


def _widened(slot: Slot) -> Tensor:
    wide = to_float32(slot.tensor.detach())
    return nn.Parameter(wide, slot.tensor.requires_grad) if slot.is_parameter else wide


def _places(slot: Slot, new: Tensor) -> Places:
    """Return where ``new`` goes; what users hung on a parameter goes with it."""
    if slot.is_parameter:
        new.__dict__.update({key: value for key, value in vars(slot.tensor).items() if key not in OURS})
    return places(slot, new)


def _restored(slot: Slot, record: Record) -> Tensor | None:
    """Return the tensor as it was before the patch, or None when the patch did not change it."""
    change = next((change for change in record.plan.changes if change.name == slot.name), None)
    dtype = torch.float32 if change is None else change.dtype
    tensor = slot.tensor
    if isinstance(tensor, HalfWeight) and tensor.reclaim():
        if dtype == torch.float16:
            tensor.store.unshare()  # an equal weight's numbers are its own again
        plain = tensor.stored.to(dtype)
    elif isinstance(tensor, HalfWeight):
        plain = tensor.widened()
    elif change is not None and change.action != KEEP and tensor.dtype == torch.float32 != dtype:
        plain = tensor.detach().to(dtype)
        if change.in_float16 and not plain.isfinite().all():  # it became float32 for what float16 cannot hold
            return None
    else:
        return None
    return nn.Parameter(plain, tensor.requires_grad) if slot.is_parameter else plain


def _summary(record: Record) -> str:
    """Return upcast's one line about a patched model."""
    plan = record.plan
    sizes = f"{console.megabytes(plan.bytes_before)} -> {console.megabytes(plan.bytes_after)}"
    float32 = ", ".join(f"{count} ({reason})" for reason, count in plan.in_float32().items())
    policy = "" if record.policy == Policy() else f"; policy {record.policy}"
    return f"{plan.model} {sizes}, {kernels.describe()} kernels; tensors in float32: {float32 or 'none'}{policy}"


def _loss(plan: Plan) -> str:
    lost = [change for change in plan.changes if change.in_float16 and not change.rounding.lossless]
    if not lost:
        return f"{plan.model} unpatched; nothing was lost"
    worst = max(lost, key=lambda change: change.rounding.max_error)
    return (
        f"{plan.model} unpatched; rounding to float16 changed {len(lost)} tensors, "
        f"by up to {worst.rounding.max_error:.1e} ({worst.name})"
    )

"""patch, unpatch, patched: the only module that changes a model."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from upcast import console, fingerprint, hooks, kernels, learning, pieces, tracking, watch
from upcast import policy as policies
from upcast.errors import UpcastError
from upcast.half_weight import OURS, HalfWeight, parameter
from upcast.huge_pages import Memory
from upcast.integrations import aside, litgpt_fused, transformers_fused
from upcast.modes import ordinary, outside_inference_mode
from upcast.parts import RECORD, Part, parts_of, patched_parts_of, roots_of
from upcast.planning import KEEP, WIDEN, Change, Plan, change_of, remarks, settle
from upcast.policy import Policy
from upcast.rounding import Rounding, survey, to_half
from upcast.slot import Slot
from upcast.store import Fallbacks
from upcast.targets import prepare, slots
from upcast.tracking import Selection

Model = TypeVar("Model")
Undo = list[tuple[nn.Module, str, Tensor]]
Choice = str | Path | Policy | object


@dataclass
class Record:
    """What `patch` did to a model: all that `unpatch` and the report need."""

    plan: Plan
    fallbacks: Fallbacks
    policy: Policy
    selection: Selection | None  # None: the policy intercepts nothing


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
            train under ``trainable``, an unknown policy, pattern or kv_cache, a saved policy for another architecture.
            Nothing has been changed then, nor when the patch is interrupted.
    """
    prepared = _prepared(model, policy, keep, kv_cache, trainable)
    record, _ = _patch(*prepared, {})
    _watch(prepared[0], record, guard, heal)
    console.say(_summary(record), record.plan)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: weights and vectors return to their original dtype, hooks and marks go. Returns ``model``.

    Of a model that is composed of several, all parts that are patched; of a piece of a patched model, that piece.
    Weights that were float16 keep their storage, without a copy. What rounding to float16 lost stays lost (and is
    said); use `patched` to get the original numbers back.

    Raises:
        UpcastError: the model is not patched.
    """
    if pieces.unpatch(model, _clear):
        return model
    found = patched_parts_of(model)
    undo: Undo = []
    try:
        _restore(roots_of(model).values(), found, undo)
    except BaseException:
        _put_back(undo)
        raise
    for part in found:
        _clear(part.module)
        console.say(_loss(part.record.plan))
    return model


@outside_inference_mode()
def _restore(roots: Iterable[nn.Module], parts: Sequence[Part], undo: Undo) -> None:
    """Put the tensors as they were before the patch in every place that holds them, also where parts share them."""
    held = {id(slot.tensor): slot for root in roots for slot in slots(root)}
    done: set[int] = set()
    for slot, record in ((slot, part.record) for part in parts for slot in slots(part.module)):
        if id(slot.tensor) not in done:
            restored = _restored(slot, record)
            if restored is not None:
                done.add(id(slot.tensor))  # it lives as long as ``held`` does
                _replace(held[id(slot.tensor)], restored, undo)


@contextmanager
def patched(
    model: Model, *, policy: Choice = "safe", keep: Sequence[str] = (), kv_cache: str | None = None
) -> Iterator[Model]:
    """Patch ``model`` for a ``with`` block; afterwards its original tensors are back, bit for bit.

    The originals stay in memory for that time. Arguments and errors as for `patch`.
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
    prepared = _prepared(model, policy, keep, kv_cache, trial=trial)
    record, undo = _patch(*prepared, {})
    try:
        yield record
    finally:
        _clear(prepared[0])
        _put_back(undo)


def is_patched(module: nn.Module) -> bool:
    """Whether this module itself was given to `patch` (not one around or inside it)."""
    return isinstance(module.__dict__.get(RECORD), Record)


def record_of(root: nn.Module) -> Record:
    """Return what `patch` noted on ``root``; raise UpcastError when it is not patched."""
    record = root.__dict__.get(RECORD)
    if isinstance(record, Record):
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
        UpcastError: the model is not patched.
    """
    return pieces.report(model) or "\n\n".join(
        f"{part.name}: {_report(part.record)}".removeprefix(": ") for part in patched_parts_of(model)
    )


def _report(record: Record) -> str:
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
    record, _ = _patch(*_prepared(root, policy, keep, kv_cache, trainable), roundings)
    _watch(root, record, guard, heal)
    console.say(_summary(record), record.plan)
    return record


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
    root, found = prepare(model, keep, trainable, optimizers=trial)
    learning.check(root, found, trainable)
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
    known: Mapping[str, tuple[torch.dtype, Rounding]],
) -> tuple[Record, Undo]:
    weights, undo = _Weights(type(root).__name__), Undo()
    changes: dict[str, Change] = {}
    try:
        for slot, action, reason, rounding, twin in settle(found, keep, weights.look):
            new = weights.make(slot, action, twin)
            if new is not None:
                _replace(slot, new, undo)
            change = change_of(slot, action, reason, rounding)
            if slot.name in known:
                dtype, lost = known[slot.name]
                change = replace(change, dtype=dtype, rounding=lost, bytes_before=slot.tensor.numel() * dtype.itemsize)
            changes[slot.name] = change
            if isinstance(new, HalfWeight):
                new.store.before = change.dtype
        selection = _run_under(root, policy)
    except BaseException:
        try:
            _clear(root)
        finally:
            _put_back(undo)
        raise
    plan = Plan(type(root).__name__, tuple(changes.values()), learning.remarks(root, found) + remarks(root))
    record = Record(plan, weights.fallbacks, policy, selection)
    root.__dict__[RECORD] = record
    return record, undo


def _watch(root: nn.Module, record: Record, guard: bool, heal: bool) -> None:
    heal = heal and record.selection is not None  # safe has nothing to widen
    if guard or heal:
        watch.install(root, guard, heal)


def _run_under(root: nn.Module, policy: Policy) -> Selection | None:
    """Install what makes the model run under ``policy``: the fast ways, which are for float32, or the interception."""
    hooks.install(root, shortcuts=policy.everywhere)
    if policy.everywhere:
        for library in (litgpt_fused, transformers_fused):
            _install_fast_ways(library, root, policy.kv_cache)
        return None
    selection = Selection(policy)
    litgpt_fused.install_caches(root, policy.kv_cache)
    tracking.install(root, selection)
    return selection


def _install_fast_ways(library: ModuleType, root: nn.Module, kv_cache: str) -> None:
    """Give ``root`` the fused forwards for a library; where that fails it goes the ordinary way, which is as right."""
    try:
        library.install(root, kv_cache)
    except Exception as error:
        library.remove(root)
        console.say(f"{type(root).__name__} runs without its fast ways ({library.__name__}): {aside.describe(error)}")


def _widened(slot: Slot) -> Tensor:
    wide = slot.tensor.detach().float()
    return nn.Parameter(wide, slot.tensor.requires_grad) if slot.is_parameter else wide


def _replace(slot: Slot, new: Tensor, undo: Undo) -> None:
    """Put ``new`` where the slot's tensor is; what users hung on a parameter goes with it."""
    if slot.is_parameter:
        new.__dict__.update({key: value for key, value in vars(slot.tensor).items() if key not in OURS})
    for module, name in slot.places:
        undo.append((module, name, slot.tensor))
        setattr(module, name, new)  # not _parameters[name]: recurrent layers keep a second list


def _put_back(undo: Undo) -> None:
    for module, name, original in reversed(undo):
        setattr(module, name, original)


def _clear(root: nn.Module) -> None:
    watch.remove(root)
    tracking.remove(root)
    hooks.remove(root)
    litgpt_fused.remove(root)
    transformers_fused.remove(root)
    root.__dict__.pop(RECORD, None)


def _restored(slot: Slot, record: Record) -> Tensor | None:
    """Return the tensor as it was before the patch, or None when the patch did not change it."""
    change = next((change for change in record.plan.changes if change.name == slot.name), None)
    dtype = torch.float32 if change is None else change.dtype
    tensor = slot.tensor
    if isinstance(tensor, HalfWeight) and tensor.store.half is not None:
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

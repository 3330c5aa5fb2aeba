"""What becomes of a model's tensors, and what is installed beside them; `transaction` carries it out."""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core import console, extensions, messages
from upcast.core.errors import UpcastError, describe
from upcast.core.extensions import Extension
from upcast.core.tensor_ref import TensorRef
from upcast.core.torch_modes import outside_inference_mode
from upcast.kernels.rounding import Rounding
from upcast.patching import hooks, pieces, several, transaction
from upcast.patching import trainable as learning
from upcast.patching.claims import alone
from upcast.patching.discovery import check_patterns, prepare, refs, unwrap
from upcast.patching.new_weights import NewWeights
from upcast.patching.parts import RECORD, Part, parts_of, patched_parts_of, roots_of, took_back
from upcast.patching.plan import KEEP, Change, Plan, change_of, decisions
from upcast.patching.transaction import Assignments, Record, assignments, take_back
from upcast.policy import fingerprint, module_scope
from upcast.policy import policy as policies
from upcast.policy.module_scope import Selection
from upcast.policy.policy import Choice, Policy
from upcast.tensor.half_weight import OURS, HalfWeight

Model = TypeVar("Model")


Prepared = tuple[nn.Module, list[TensorRef], list[str], Policy]
Watcher = Callable[[nn.Module, bool], None]
"""Has a patched model watched; the flag says whether its policy is other than safe."""


def patch(
    model: Model,
    *,
    policy: Choice = "safe",
    keep: Sequence[str] = (),
    kv_cache: str | None = None,
    trainable: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Model:
    """Do what `upcast.patch` says, with what watches the model afterwards, if anything does."""
    named = roots_of(model)
    roots, stays = list(dict.fromkeys(named.values())), list[str]()

    def prepared(root: nn.Module) -> Prepared:
        return _prepared(root, policy, keep, kv_cache, trainable)

    def act() -> list[Record]:
        took_back(model)
        left = [root for root in roots if not is_patched(root)]
        if len(roots) == 1 or not left:
            return [_patch(*prepared(roots[0]), watcher=watcher)]
        several.check_apart(named)
        stays.extend(name for name, root in named.items() if root not in left)
        return several.all_or_none(
            left, [prepared(root) for root in left], lambda each, lent: _patch(*each, originals=lent, watcher=watcher)
        )

    for record in alone(roots, act):
        say(record)
    if stays:
        messages.say(f"patched already, and left as they were: {', '.join(stays)}")
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`: weights and vectors return to their original dtype, hooks and marks go. Returns ``model``.

    Of a model that is composed of several, all parts that are patched; of a piece of a patched model, that piece.
    Weights that were float16 keep their storage, without a copy. What rounding to float16 lost stays lost (and is
    said); use `patched` to get the original numbers back. Interrupted, the model is patched or unpatched, never half.

    Raises:
        UpcastError: the model is not patched, or another thread is at work on it.

    Examples:
        >>> model = upcast.patch(torch.nn.Linear(8, 4).eval())
        >>> type(upcast.unpatch(model).weight).__name__
        'Parameter'
    """
    alone(roots_of(model).values(), lambda: _unpatch(model))
    return model


def _unpatch(model: object) -> None:
    if (took_back(model) and not parts_of(model)) or pieces.unpatch(model):
        return
    found = patched_parts_of(model)
    with outside_inference_mode():
        transaction.unpatch([part.module for part in found], *_restored(roots_of(model).values(), found))
    for part in found:
        messages.say(_loss(part.record.plan))


def _restored(roots: Iterable[nn.Module], parts: Sequence[Part]) -> tuple[Assignments, Assignments]:
    """Return the tensors as they were before the patch, and those that are there now.

    For every place that holds them, also where parts share them.
    """
    held = {id(ref.tensor): ref for root in roots for ref in refs(root)}
    done: set[int] = set()
    restored, present = Assignments(), Assignments()
    for ref, record in ((ref, part.record) for part in parts for ref in refs(part.module)):
        tensor = None if id(ref.tensor) in done else _before(ref, record)
        if tensor is not None:
            done.add(id(ref.tensor))  # it lives as long as ``held`` does
            restored += _assignments(held[id(ref.tensor)], tensor)
            present += assignments(held[id(ref.tensor)], ref.tensor)
    return restored, present


@contextmanager
def borrowed(
    model: object, *, policy: Choice, keep: Sequence[str] = (), kv_cache: str | None = None, trial: bool = False
) -> Iterator[Record]:
    """As `patched`, without a word; yields the record.

    A trial runs forward passes and nothing else: an optimizer that holds the parameters does not matter then, because
    they come back before it can step.
    """
    root, originals, entered = unwrap(model), Assignments(), False
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


def _give_back(root: nn.Module, originals: Assignments) -> None:
    """Put back what was borrowed; where another thread is at work on it, after that."""
    alone([root], lambda: take_back(root, originals), waits=True)


def _is_lent(root: nn.Module, originals: Assignments) -> bool:
    record = root.__dict__.get(RECORD)
    return isinstance(record, Record) and record.lent is originals


def is_patched(module: nn.Module) -> bool:
    """Whether this module itself was given to `patch` (not one around or inside it)."""
    record = module.__dict__.get(RECORD)
    return isinstance(record, Record) and record.recover(module)


def record_of(root: nn.Module) -> Record:
    """Return what `patch` noted on ``root``; raise UpcastError when it is not patched."""
    record = root.__dict__.get(RECORD)
    if isinstance(record, Record) and record.recover(root):
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
    lines = [f"policy: {record.policy}", f"kernels: {kernels.describe()}", f"upcast whole: {record.fallbacks}"]
    for why, (count, size) in record.fallbacks.dissolved.items():
        lines.append(f"float32 since then: {count} weights, {console.megabytes(size)}, because {why}")
    return "\n".join([str(record.plan), *lines])


def adopt(
    root: nn.Module,
    roundings: Mapping[str, tuple[torch.dtype, Rounding]],
    kv_cache: str | None,
    policy: Choice = "safe",
    watcher: Watcher | None = None,
    keep: Sequence[str] = (),
    trainable: Sequence[str] = (),
    asked: bool = True,
) -> Record:
    """Patch a model whose loader rounded some weights, of which it knows name -> (original dtype, what was lost)."""
    record = alone(
        [root],
        lambda: _patch(*_prepared(root, policy, keep, kv_cache, trainable, loaded=True), roundings, watcher=watcher),
    )
    record.asked = asked
    say(record)
    return record


def check(root: nn.Module, policy: Choice, keep: Sequence[str] = (), trainable: Sequence[str] = ()) -> None:
    """Raise what `adopt` would of a model whose weights a loader is about to read, where that can be known by then."""
    kernels.active()
    check_patterns(root, refs(root), keep, trainable)
    module_scope.check(root, policies.resolve(policy, check=functools.partial(fingerprint.check, root, loaded=False)))


def _prepared(
    model: object,
    policy: Choice,
    keep: Sequence[str],
    kv_cache: str | None,
    trainable: Sequence[str] = (),
    *,
    trial: bool = False,
    loaded: bool = False,
) -> Prepared:
    """Return the module to patch, its tensors, what to keep and the policy, after every check that can refuse them."""
    kernels.active()  # an impossible choice is refused before anything changes
    if kv_cache is not None:
        policies.check_kv_cache(kv_cache)
    policies.resolve(policy)
    took_back(model)
    root, found = prepare(model, keep, trainable, optimizers=trial, loaded=loaded)
    chosen = policies.resolve(policy, check=functools.partial(fingerprint.check, root))
    module_scope.check(root, chosen)
    if kv_cache is not None:
        chosen = replace(chosen, kv_cache=kv_cache)
    return root, found, [*keep, "*"] if chosen.storage == "float32" else [*keep], chosen


@outside_inference_mode()
def _patch(
    root: nn.Module,
    found: Sequence[TensorRef],
    keep: Sequence[str],
    policy: Policy,
    known: Mapping[str, tuple[torch.dtype, Rounding]] | None = None,
    *,
    originals: Assignments | None = None,
    watcher: Watcher | None = None,
) -> Record:
    """Patch ``root``, all or nothing; what is replaced comes into ``originals`` as well, before it is."""
    weights, tensors, lent = (
        NewWeights(type(root).__name__, policy.storage, known is not None),
        Assignments(),
        originals,
    )
    originals = Assignments() if originals is None else originals
    changes: dict[str, Change] = {}
    for ref, action, reason, rounding, alias in decisions(found, keep, weights.look):
        new = weights.make(ref, action, alias)
        if new is not None:
            tensors += _assignments(ref, new)
            originals += assignments(ref, ref.tensor)
        change = change_of(ref, action, reason, rounding)
        if known and ref.name in known:
            dtype, lost = known[ref.name]
            change = replace(change, dtype=dtype, rounding=lost, bytes_before=ref.tensor.numel() * dtype.itemsize)
        changes[ref.name] = change
        if isinstance(new, HalfWeight):
            new.store.before = change.dtype
    plan = Plan(type(root).__name__, tuple(changes.values()), learning.remarks(root, found) + extensions.remarks(root))
    selection = None if policy.everywhere else Selection(policy)
    record = Record(plan, weights.fallbacks, policy, selection, tuple(keep), lent=lent)
    transaction.patch(root, record, tensors, originals, lambda: _install(root, record, watcher))
    return record


def _install(root: nn.Module, record: Record, watcher: Watcher | None) -> None:
    """Install what makes the model run under its policy: the fast ways, which are for float32, or the interception."""
    policy, selection = record.policy, record.selection
    hooks.install(root, unpatch, shortcuts=selection is None)
    for extension in extensions.registered():
        if selection is None:
            _install_fast_ways(extension, root, policy.kv_cache)
        else:
            extension.install_caches(root, policy.kv_cache)
    if selection is not None:
        module_scope.install(root, selection)
    if watcher is not None:
        watcher(root, selection is not None)


def _install_fast_ways(extension: Extension, root: nn.Module, kv_cache: str) -> None:
    """Give ``root`` the fused forwards for a library; where that fails it goes the ordinary way, which is as right."""
    try:
        extension.install(root, kv_cache)
    except Exception as error:
        transaction.remove_extension(root, extension)
        why = f"{type(root).__name__} runs without its fast ways for {extension.name}: {describe(error)}"
        messages.say(why, level=logging.WARNING)


def _assignments(ref: TensorRef, new: Tensor) -> Assignments:
    """Return where ``new`` goes; what users hung on a parameter goes with it."""
    if ref.is_parameter:
        new.__dict__.update({key: value for key, value in vars(ref.tensor).items() if key not in OURS})
    return assignments(ref, new)


def _before(ref: TensorRef, record: Record) -> Tensor | None:
    """Return the tensor as it was before the patch, or None when the patch did not change it."""
    change = next((change for change in record.plan.changes if change.name == ref.name), None)
    tensor = ref.tensor
    dtype = torch.float32 if change is None else change.dtype
    if change is None and isinstance(tensor, HalfWeight):  # tied to another, of which it was parted since
        dtype = tensor.store.before
    if isinstance(tensor, HalfWeight) and tensor.reclaim():
        if dtype == torch.float16:
            tensor.store.unshare()  # an equal weight's numbers are its own again
        plain = tensor.stored.to(dtype)
    elif isinstance(tensor, HalfWeight):
        plain = tensor.upcast()
    elif change is not None and change.action != KEEP and tensor.dtype == torch.float32 != dtype:
        plain = tensor.detach().to(dtype)
        if change.in_float16 and not plain.isfinite().all():  # it became float32 for what float16 cannot hold
            return None
    else:
        return None
    return nn.Parameter(plain, tensor.requires_grad) if ref.is_parameter else plain


def say(record: Record) -> None:
    """Say upcast's one line about a patched model."""
    plan = record.plan
    sizes = f"{console.megabytes(plan.bytes_before)} -> {console.megabytes(plan.bytes_after)}"
    float32 = ", ".join(f"{count} ({reason})" for reason, count in plan.in_float32().items())
    policy = "" if record.policy == Policy() else f"; policy {record.policy}"
    line = f"{plan.model} {sizes}, {kernels.describe()} kernels; tensors in float32: {float32 or 'none'}{policy}"
    messages.say(line, plan)


def _loss(plan: Plan) -> str:
    lost = [change for change in plan.changes if change.in_float16 and not change.rounding.lossless]
    if not lost:
        return f"{plan.model} unpatched; nothing was lost"
    worst = max(lost, key=lambda change: change.rounding.max_error)
    return (
        f"{plan.model} unpatched; rounding to float16 changed {len(lost)} tensors, "
        f"by up to {worst.rounding.max_error:.1e} ({worst.name})"
    )

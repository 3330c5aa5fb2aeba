"""All or nothing: how a model gets other tensors and forwards, or its own back, wherever that is interrupted.

An interruption (Ctrl-C, a time limit, an error in the model's own code) may come between any two lines. Tensors are
made before the first change. Then a `Record` with the model's own tensors stands on the model, and until it says that
the patch is whole the way leads back: where it is cut short, and, if a second interruption cuts that short as well,
when the model is next looked at. Who calls these functions has claimed the model: see `upcast.claims`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from upcast import claims, console, hooks, tracking, watch
from upcast.integrations import aside, litgpt_fused, transformers_fused
from upcast.parts import RECORD
from upcast.planning import Plan
from upcast.policy import Policy
from upcast.slot import Slot, set_tensor
from upcast.store import Fallbacks
from upcast.tracking import Selection

Places = list[tuple[nn.Module, str, Tensor]]


@dataclass
class Record:
    """What `patch` did to a model: all that `unpatch` and the report need."""

    plan: Plan
    fallbacks: Fallbacks
    policy: Policy
    selection: Selection | None  # None: the policy intercepts nothing
    originals: Places | None = None  # what was replaced, while the model is on its way; None: the patch is whole
    lent: Places | None = None  # the originals of a patch for the time of a block, which gives them back

    def settle(self, root: nn.Module) -> bool:
        """Take ``root`` back if a patch was cut short, and the way back too; return whether the patch is whole.

        Raises:
            UpcastError: another thread is at work on the model.
        """
        return self.originals is None or claims.alone([root], lambda: self._settled(root))

    def _settled(self, root: nn.Module) -> bool:
        if self.originals is not None and root.__dict__.get(RECORD) is self:
            take_back(root, self.originals)
        return self.originals is None  # another thread may have been first


def places(slot: Slot, tensor: Tensor) -> Places:
    """Return every place of ``slot``, with what is to be there."""
    return [(module, name, tensor) for module, name in slot.places]


def put(tensors: Places) -> None:
    """Put tensors at their places; twice is as good as once."""
    for module, name, tensor in tensors:
        set_tensor(module, name, tensor)


def patch(root: nn.Module, record: Record, tensors: Places, originals: Places, guard: bool, heal: bool) -> None:
    """Put ``tensors`` into ``root`` and install what runs it: all of it, or the originals are back."""
    record.originals = originals
    try:
        root.__dict__[RECORD] = record
        put(tensors)
        _install(root, record, guard, heal)
        record.originals = None  # from here on the model is patched
    except BaseException:
        if record.originals is not None:
            take_back(root, originals)
        raise


def _install(root: nn.Module, record: Record, guard: bool, heal: bool) -> None:
    """Install what makes the model run under its policy: the fast ways, which are for float32, or the interception."""
    policy, selection = record.policy, record.selection
    hooks.install(root, shortcuts=selection is None)
    if selection is None:
        for library in (litgpt_fused, transformers_fused):
            _install_fast_ways(library, root, policy.kv_cache)
    else:
        litgpt_fused.install_caches(root, policy.kv_cache)
        tracking.install(root, selection)
    heal = heal and selection is not None  # safe has nothing to widen
    if guard or heal:
        watch.install(root, guard, heal)


def _install_fast_ways(library: ModuleType, root: nn.Module, kv_cache: str) -> None:
    """Give ``root`` the fused forwards for a library; where that fails it goes the ordinary way, which is as right."""
    try:
        library.install(root, kv_cache)
    except Exception as error:
        library.remove(root)
        console.say(f"{type(root).__name__} runs without its fast ways ({library.__name__}): {aside.describe(error)}")


def take_back(root: nn.Module, originals: Places) -> None:
    """Give ``root`` the tensors that it had before the patch, however much of that was done; the record goes last."""
    record = root.__dict__.get(RECORD)
    if isinstance(record, Record):
        record.originals = originals
    remove(root)
    put(originals)
    root.__dict__.pop(RECORD, None)


def unpatch(roots: Sequence[nn.Module], tensors: Places, present: Places) -> None:
    """Put ``tensors`` in place of those that are ``present``, and take away all that `patch` installed in ``roots``.

    Until all tensors are there the way leads back, and then on. A second interruption leaves a model that is patched
    with some of its tensors, which `upcast.unpatch` takes for what it is.
    """
    there = False
    try:
        put(tensors)
        there = True
        _clear(roots)
    except BaseException:
        if there:
            _clear(roots)
        else:
            put(present)
        raise


def _clear(roots: Sequence[nn.Module]) -> None:
    for root in roots:
        remove(root)
        root.__dict__.pop(RECORD, None)


def remove(root: nn.Module) -> None:
    """Take away every hook and forward of ours, however many are there."""
    watch.remove(root)
    tracking.remove(root)
    hooks.remove(root)
    litgpt_fused.remove(root)
    transformers_fused.remove(root)

"""All or nothing: how a model gets other tensors and forwards, or its own back, wherever that is interrupted.

An interruption (Ctrl-C, a time limit, an error in the model's own code) may come between any two lines. Tensors are
made before the first change. Then a `Record` with the model's own tensors stands on the model, and until it says that
the patch is whole the way leads back: where it is cut short, and, if a second interruption cuts that short as well,
when the model is next looked at. Who calls these functions has claimed the model: see `upcast.patching.claims`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from upcast.core import extensions, forward_override
from upcast.core.extensions import Extension
from upcast.core.module_tree import modules
from upcast.core.tensor_ref import TensorRef, set_tensor
from upcast.patching import claims, hooks
from upcast.patching.fast_linear import LinearForward
from upcast.patching.parts import RECORD
from upcast.patching.plan import Plan
from upcast.policy import module_scope
from upcast.policy.module_scope import Selection
from upcast.policy.policy import Policy
from upcast.tensor.store import Fallbacks

Assignments = list[tuple[nn.Module, str, Tensor]]


@dataclass
class Record:
    """What `patch` did to a model: all that `unpatch` and the report need."""

    plan: Plan
    fallbacks: Fallbacks
    policy: Policy
    selection: Selection | None  # None: the policy intercepts nothing
    keep: tuple[str, ...] = ()  # the patterns that were given
    asked: bool = True  # by the program; False: by a variable of the environment
    originals: Assignments | None = None  # what was replaced, while the model is on its way; None: the patch is whole
    lent: Assignments | None = None  # the originals of a patch for the time of a block, which gives them back

    def recover(self, root: nn.Module) -> bool:
        """Take ``root`` back if a patch was cut short, and the way back too; return whether the patch is whole.

        Raises:
            UpcastError: another thread is at work on the model.
        """
        return self.originals is None or claims.alone([root], lambda: self._recovered(root))

    def _recovered(self, root: nn.Module) -> bool:
        if self.originals is not None and root.__dict__.get(RECORD) is self:
            take_back(root, self.originals)
        return self.originals is None  # another thread may have been first


def assignments(ref: TensorRef, tensor: Tensor) -> Assignments:
    """Return every owner of ``ref``, with what is to be there."""
    return [(module, name, tensor) for module, name in ref.owners]


def put(tensors: Assignments) -> None:
    """Give tensors to their owners; twice is as good as once."""
    for module, name, tensor in tensors:
        set_tensor(module, name, tensor)


def patch(
    root: nn.Module, record: Record, tensors: Assignments, originals: Assignments, install: Callable[[], None]
) -> None:
    """Put ``tensors`` into ``root`` and call ``install``, for what runs them: all of it, or the originals are back."""
    record.originals = originals
    try:
        root.__dict__[RECORD] = record
        put(tensors)
        install()
        record.originals = None  # from here on the model is patched
    except BaseException:
        if record.originals is not None:
            take_back(root, originals)
        raise


def take_back(root: nn.Module, originals: Assignments) -> None:
    """Give ``root`` the tensors that it had before the patch, however much of that was done; the record goes last."""
    record = root.__dict__.get(RECORD)
    if isinstance(record, Record):
        record.originals = originals
    remove(root)
    put(originals)
    root.__dict__.pop(RECORD, None)


def unpatch(roots: Sequence[nn.Module], tensors: Assignments, present: Assignments) -> None:
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
    module_scope.remove(root)
    hooks.remove(root)
    extended = extensions.registered()
    for extension in extended:
        extension.remove(root)
    _remove_forwards(root, "guard", LinearForward.owner, *(extension.name for extension in extended))


def remove_extension(root: nn.Module, extension: Extension) -> None:
    """Take away what an extension gave ``root``."""
    extension.remove(root)
    _remove_forwards(root, extension.name)


def _remove_forwards(root: nn.Module, *owners: str) -> None:
    for module in modules(root):
        forward_override.remove(module, *owners)

"""guard and heal: a patched model whose result is not finite says where it comes from, or cures itself.

The model's forward is wrapped, and those of the modules inside it that generation loops call by themselves; each call
costs one sum over the logits. Only when that is not finite does anything else happen: the step is run again, from the
state before it, to find or to avoid what went wrong. In training, guard watches the gradients as
well (`upcast.guard.backward`).
"""

import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from upcast.analysis.range_observer import RangeObserver
from upcast.analysis.runner import SAFE, trial
from upcast.analysis.smallest import smallest
from upcast.core import extensions, messages, scopes
from upcast.core import forward_override as forwards
from upcast.core.errors import UpcastError
from upcast.core.forward_override import Forward
from upcast.core.module_tree import modules
from upcast.core.outputs import find_answer
from upcast.guard.backward import Backward
from upcast.guard.snapshot import State
from upcast.kernels import transforms
from upcast.patching.engine import record_of
from upcast.policy import module_scope
from upcast.policy.policy import ALL, Policy, show

_local: Any = threading.local()  # .roots: models whose forward this thread is in


class GuardedForward(Forward):
    """The forward of a watched model, around the one that it has; also of a module inside it that is called by itself.

    Of the watched modules of one model that are inside one another, the outermost that is called watches.
    """

    owner = "guard"
    looks_on = True
    weak = ("_module", "_root")

    def __init__(self, module: nn.Module, root: nn.Module, guard: bool, heal: bool) -> None:
        super().__init__(module)
        self._root = weakref.ref(root)
        self.guard, self.heal = guard, heal
        self.lenient = False  # infinite numbers are meant, as in masked logits: only NaN counts
        self.backward = Backward(module, root)

    @property
    def root(self) -> Any:
        """The patched model; of a part that outlives it, the part."""
        root = self._root()
        return self.module if root is None else root

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.below or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if transforms.active() or not forwards.observes():
            return self._run(args, kwargs)
        roots = getattr(_local, "roots", ())
        if any(root is self.root for root in roots):
            return self._run(args, kwargs)
        state = State(args, kwargs, self.module)
        output = scopes.within(_local, "roots", (*roots, self.root), lambda: self._watched(state, args, kwargs))
        if self.guard and torch.is_grad_enabled():
            self.backward.follow(output, args, kwargs, state)
        return output

    def _watched(self, state: State, args: Any, kwargs: Any) -> Any:
        output = self._run(args, kwargs)
        return output if self._fine(output) else self._mend(output, state, args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Any:
        if self.below is not None:
            return self.below(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _fine(self, output: Any) -> bool:
        return all(map(self._all_fine, output if _in_chunks(output) else [_answer(output)]))

    def _all_fine(self, value: Tensor | None) -> bool:
        if value is None or math.isfinite(float(value.detach().sum(dtype=torch.float32))):
            return True
        return not bool(value.isnan().any()) if self.lenient else bool(value.isfinite().all())

    def _mend(self, output: Any, state: State, args: Any, kwargs: Any) -> Any:
        sample = (args, kwargs)
        with trial(self.root, training=True) as run:
            run.module = self.module
            findings = _findings()
            state.restore()
            wide = run.run(SAFE, sample, findings.in_float32)
            curable = self._fine(wide)
        if not curable and _bad(wide) == _bad(output) and not _has_nan(output):
            self.lenient = True  # float32 says the same, so it is meant
        elif curable and self.heal:
            return self._heal(findings, state, args, kwargs)
        elif self.guard:
            state.restore()
            training = torch.is_grad_enabled() and _learns(output)
            when = f" in training step {self.backward.steps + 1}" if training else ""
            raise self._error(state, sample, "" if curable else findings.first_nonfinite or "its inputs", when)
        state.restore()
        return self._run(args, kwargs)

    def _heal(self, findings: Any, state: State, args: Any, kwargs: Any) -> Any:
        """Upcast the policy by the smallest set of classes that gives a finite result, and return that result."""
        selection = record_of(self.root).selection
        assert selection is not None
        base = selection.policy

        tried: list[Any] = []  # the last set, and what it gave

        def enough(added: frozenset[str], _: str = "") -> bool:
            module_scope.change(self.root, selection, with_classes(base, added))
            state.restore()
            tried[:] = added, self._run(args, kwargs)
            return self._fine(tried[1])

        found = smallest(findings.ranked(), findings.beyond(), enough)
        added = ALL if found is None else found
        if tried[0] != added:
            enough(added)
        record_of(self.root).policy = selection.policy
        messages.say(
            f"{type(self.root).__name__}: a value that is not finite under policy {base}; from this step on "
            f"{show(added)} runs in float32 too: policy {selection.policy}"
        )
        return tried[1]

    def _error(self, state: State, sample: Any, wide: str, when: str) -> UpcastError:
        name = type(self.root).__name__
        if wide:
            return UpcastError(
                f"{name}: the result is not finite{when}, and in float32 it is not either, first in {wide}; no policy "
                "cures that. Check weights and inputs."
            )
        record = record_of(self.root)
        if record.selection is None:
            return UpcastError(
                f"{name}: the result is not finite{when}, and is when the same step is run again: the model does not "
                "give the same twice. Look for state of its own that a step changes, and run it in eval mode if it is "
                "not trained."
            )
        policy = record.policy
        findings = _findings()
        with trial(self.root, training=True) as run:
            run.module = self.module
            for each, observer in ((SAFE, findings.in_float32), (policy, findings.in_float16)):
                state.restore()
                run.run(each, sample, observer)
        state.restore()
        where = findings.culprit or "an unknown place"
        return UpcastError(
            f"{name}: the result is not finite{when} under policy {policy}; first in {where}. "
            "Patch with heal=True, or with the policy that upcast.search finds."
        )


def with_classes(policy: Policy, added: frozenset[str]) -> Policy:
    """Return ``policy`` with more classes upcast, everywhere."""
    overrides = tuple((pattern, classes | added) for pattern, classes in policy.overrides)
    return Policy(policy.classes | added, overrides, policy.kv_cache, policy.storage)


def watcher(guard: bool, heal: bool) -> Callable[[nn.Module, bool], None] | None:
    """Return what has a model watched once it is patched, or None: nothing is to be watched."""
    return functools.partial(install, guard=guard, heal=heal) if guard or heal else None


def install(root: nn.Module, selective: bool, guard: bool, heal: bool) -> None:
    """Have ``root`` watched, by whichever door it is entered; healing is for policies that are ``selective``."""
    heal = heal and selective  # safe has nothing to upcast
    for module in list(_doors(root)) if guard or heal else ():
        forwards.push(module, GuardedForward(module, root, guard, heal))


def _doors(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called from outside: the root, and what generation loops call instead of it.

    A model that wraps another may have the inner one generate.
    """
    found = {id(root): root}
    found |= {id(module): module for module in modules(root) if hasattr(type(module), "generate")}
    for extension in extensions.registered():
        found |= {id(module): module for module in extension.doors(root)}
    yield from found.values()


def _answer(output: Any) -> Tensor | None:
    return find_answer(output)


def _in_chunks(output: Any) -> bool:
    """Whether the result is logits in chunks, which need not be joined to be looked at."""
    return isinstance(output, list) and bool(output) and all(isinstance(each, Tensor) for each in output)


def _learns(output: Any) -> bool:
    value = _answer(output)
    return value is not None and value.requires_grad


def _bad(output: Any) -> int:
    value = _answer(output)
    return 0 if value is None else int((~value.isfinite()).sum())


def _has_nan(output: Any) -> bool:
    value = _answer(output)
    return value is not None and bool(value.isnan().any())


def _findings() -> RangeObserver:
    return RangeObserver(math.inf)

"""guard in training: a gradient that is not finite says which operation's backward made it, and in which step.

A watched step costs one look at the gradient of the result, when it arrives, and one at the gradients of what learns,
when the backward pass has ended. Only when one of them is not finite is the step run again, under the same random
numbers, with a look at the gradients of every operation. For that the gradient of the result is held until the end.
"""

import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from upcast.analysis.range_observer import all_finite
from upcast.analysis.runner import trial
from upcast.core.errors import UpcastError
from upcast.core.forward_override import Attached
from upcast.core.outputs import tensors
from upcast.patching.engine import record_of

_ENGINE = Variable._execution_engine
_REMEDY = "Look at that module and at the batch; a lower learning rate or a smaller loss keeps gradients in range."


class Step:
    """One forward pass in training: its inputs, the state before it, and the gradients that its results got."""

    def __init__(self, number: int, args: Any, kwargs: Any, state: Any) -> None:
        self.number, self.args, self.kwargs, self.state = number, args, kwargs, state
        self.gradients: dict[str, Tensor] = {}
        self.bad_input = False  # the gradient of something learned outside the model

    def locate(self, module: nn.Module, root: nn.Module) -> str:
        """Run the step of ``module`` again, under the policy of ``root``, the patched model that it is in or is.

        Return which module and operation made the first gradient that is not finite.
        """
        trace = Trace()
        self.state.restore()
        sample = pytree.tree_map_only(Tensor, _leaf, (self.args, self.kwargs))
        with trial(root, training=True) as run, _gradients_kept(root), torch.enable_grad():
            run.module = module
            output = run.run(record_of(root).policy, sample, trace.note, gradients=True)
            results = dict(tensors(output))
            names = ["loss"] if "loss" in self.gradients else list(self.gradients)
            used = [name for name in names if name in results and results[name].requires_grad]
            trace.follow([results[name] for name in used])
            torch.autograd.backward([results[name] for name in used], [self.gradients[name] for name in used])
        self.state.restore()
        return trace.culprit


class Backward(Attached):
    """The backward passes of one watched module in ``root``. ``steps`` counts its forward passes in training."""

    weak = ("_module", "_root")

    def __init__(self, module: nn.Module, root: nn.Module) -> None:
        super().__init__(module)
        self._root = weakref.ref(root)
        self.steps = 0
        self._arrived: list[Step] = []

    @property
    def root(self) -> Any:
        """The patched model; of a part that outlives it, the part."""
        root = self._root()
        return self.module if root is None else root

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_arrived": []}  # a copy of a model is in no backward pass

    def follow(self, output: Any, args: Any, kwargs: Any, state: Any) -> None:
        """Be told of the gradients of ``output`` if it has any, and of the end of the backward pass.

        Raises:
            UpcastError: the loss in ``output`` is not finite.
        """
        results = [(name, tensor) for name, tensor in tensors(output) if tensor.requires_grad]
        if not results:
            return
        self.steps += 1
        self._arrived.clear()  # of a backward pass that was broken off
        step = Step(self.steps, args, kwargs, state)
        for name, tensor in results:
            if name == "loss" and not all_finite(tensor):
                raise UpcastError(
                    f"{self._name}: the loss is not finite in training step {step.number}, though the result is. "
                    "Check the labels of that batch: a mean over none, where all are ignored, is NaN."
                )
            tensor.register_hook(partial(self._arrive, step, name))
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._leave, step))

    @property
    def _name(self) -> str:
        return type(self.module).__name__

    def _arrive(self, step: Step, name: str, gradient: Tensor) -> None:
        if not all_finite(gradient):
            raise UpcastError(
                f"{self._name}: the gradient that its {name} gets in training step {step.number} is not finite, though "
                "the result is: the loss is not finite, or has no finite gradient. Check the labels of that batch and "
                "what computes the loss."
            )
        if not self._arrived:
            _ENGINE.queue_callback(self._end)
        if step not in self._arrived:
            self._arrived.append(step)
        step.gradients[name] = gradient

    @staticmethod
    def _leave(step: Step, gradient: Tensor) -> None:
        step.bad_input = step.bad_input or not all_finite(gradient)

    def _end(self) -> None:
        steps, self._arrived = self._arrived, []
        bad = next((name for name, p in self.root.named_parameters() if _bad(p.grad)), "")
        if not bad and any(step.bad_input for step in steps):
            bad = "its inputs"
        if bad:
            places = [(step.number, step.locate(self.module, self.root)) for step in steps]
            number, where = next((place for place in places if place[1]), (steps[0].number, ""))
            raise UpcastError(
                f"{self._name}: the gradient of {bad} is not finite in training step {number}; "
                f"first in {where or 'an unknown place: the step run again is finite'}. {_REMEDY}"
            )
        for step in steps:
            step.gradients.clear()


class Trace:
    """Which operation made which part of autograd's graph, and the first part whose gradients are not finite.

    Autograd numbers what it records in order; what lies between two operations' last numbers belongs to the second.
    """

    def __init__(self) -> None:
        self.culprit = ""
        self._last: list[int] = []
        self._names: list[str] = []

    def note(self, session: Any, op_class: str | None, name: str, _: list[Tensor], result: Any) -> None:
        """Note an operation's place in the graph (an observer of `upcast.policy.mode`)."""
        for part in result if isinstance(result, (tuple, list)) else [result]:
            node = part.grad_fn if isinstance(part, Tensor) else None
            if node is not None and node._sequence_nr() > (self._last[-1] if self._last else -1):
                self._last.append(node._sequence_nr())
                what = name if op_class in (None, name) else f"{op_class} ({name})"
                self._names.append(f"{session.frames[-1].name or '(the model itself)'}: {what}")

    def follow(self, results: list[Tensor]) -> None:
        """Have every part of the graph behind ``results`` looked at in the next backward pass."""
        seen: set[Node] = set()
        waiting = [result.grad_fn for result in results]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
                node.register_hook(partial(self._look, node))

    def _look(self, node: Node, made: Any, got: Any) -> None:
        if not self.culprit and (any(map(_bad, made)) or any(map(_bad, got))):
            sizes = [float(each.detach().abs().max()) for each in got if each is not None and each.numel()]
            self.culprit = f"{self._name(node)}, in the backward pass, from gradients up to {max(sizes, default=0):.3g}"

    def _name(self, node: Node) -> str:
        index = bisect_left(self._last, node._sequence_nr())
        return self._names[index] if index < len(self._names) else node.name()


def _bad(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout == torch.strided and not all_finite(gradient)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


@contextmanager
def _gradients_kept(module: nn.Module) -> Iterator[None]:
    """Within the block, gradients go nowhere: those that were there are put back."""
    kept = [(parameter, parameter.grad) for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
        _put_back(kept)
    except BaseException:
        _put_back(kept)
        raise


def _put_back(gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    for parameter, gradient in gradients:
        parameter.grad = gradient

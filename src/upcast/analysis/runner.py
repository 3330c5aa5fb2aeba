"""Running a model under one policy after another, on the user's inputs: for diagnosis, search and certificate."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, RandomSampler

from upcast.analysis.range_observer import RangeObserver, all_finite
from upcast.core import console, scopes
from upcast.core.errors import UpcastError
from upcast.core.forward_override import unobserved
from upcast.core.module_tree import modules, named_modules
from upcast.core.outputs import find_answer
from upcast.patching import engine
from upcast.patching.discovery import unwrap
from upcast.policy import module_scope
from upcast.policy.mode import Observer
from upcast.policy.module_scope import Selection
from upcast.policy.policy import Policy
from upcast.tensor.half_weight import HalfWeight

SAFE, NONE = Policy(), Policy(frozenset())

Sample = tuple[tuple[Any, ...], dict[str, Any]]


class Samples:
    """The samples of ``inputs``, one at a time and as often as they are asked for.

    Args:
        inputs: one sample, or what gives samples each time it is iterated: a list, a Dataset, a DataLoader. None: the
            keyword arguments are the sample.
        kwargs: keyword arguments of every sample.

    Raises:
        UpcastError: ``inputs`` can be iterated only once, or comes in another order each time.
    """

    def __init__(self, inputs: Any, kwargs: Mapping[str, Any]) -> None:
        if isinstance(inputs, Iterator):
            raise UpcastError(
                f"inputs is a {type(inputs).__name__}, which gives its samples only once; every policy is run on them, "
                "so they must come again each time. Pass a list, a Dataset or a DataLoader, or list(inputs)."
            )
        if isinstance(inputs, DataLoader) and isinstance(inputs.sampler, RandomSampler):
            raise UpcastError(
                "inputs is a DataLoader that shuffles; policies can be compared only on the same samples in the same "
                "order. Make it with shuffle=False."
            )
        self.inputs, self.kwargs = inputs, kwargs

    def count(self) -> int:
        """Return how many samples there are, as far as that is known; else one."""
        one = self.inputs is None or isinstance(self.inputs, (Tensor, Mapping, tuple))
        return 1 if one or not isinstance(self.inputs, Sized) else len(self.inputs)

    def __iter__(self) -> Iterator[Sample]:
        """Yield (args, kwargs) of each: a tensor, a mapping (keyword arguments) or a tuple (positional ones).

        Raises:
            UpcastError: there is no input, one is of another kind, or a tensor is not on the CPU.
        """
        count = 0
        for each in self._each():
            count += 1
            yield _sample(each, self.kwargs)
            del each  # before the next one is made: a stream may be longer than memory
        if not count and self.kwargs:
            count = 1
            yield _sample({}, self.kwargs)
        if not count:
            raise UpcastError(
                "no inputs; the model has to run to be measured. Pass token ids, or what it is called with."
            )

    def _each(self) -> Iterator[Any]:
        inputs = self.inputs
        if inputs is None:
            return
        if isinstance(inputs, (Tensor, Mapping, tuple, str, bytes)):
            yield inputs
        elif isinstance(inputs, Iterable):
            yield from map(_positional, inputs)
        elif hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):  # a Dataset
            yield from (_positional(inputs[index]) for index in range(len(inputs)))
        else:
            yield inputs


def _positional(sample: Any) -> Any:
    """A DataLoader makes lists of what its Dataset gives as tuples."""
    return tuple(sample) if isinstance(sample, list) else sample


def _sample(value: Any, kwargs: Mapping[str, Any]) -> Sample:
    if isinstance(value, Mapping):
        sample: Sample = ((), {**value, **kwargs})
    elif isinstance(value, tuple):
        sample = (value, dict(kwargs))
    elif isinstance(value, Tensor):
        sample = ((value,), dict(kwargs))
    else:
        text = isinstance(value, (str, bytes)) or (isinstance(value, list) and isinstance(next(iter(value), None), str))
        remedy = "Encode text with the model's tokenizer first" if text else "Pass several samples as a list of these"
        raise UpcastError(
            f"an input is a {type(value).__name__}; it must be a tensor, a mapping of keyword arguments or a tuple of "
            f"positional ones. {remedy}."
        )
    for leaf in pytree.tree_leaves(sample):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            raise UpcastError(f"an input is on {leaf.device}; upcast computes on the CPU. Move it with .to('cpu').")
    return sample


def answer(output: Any) -> Tensor:
    """Return the tensor that a model's output is judged by: its logits, or else its first floating-point tensor."""
    found = find_answer(output)
    if found is None:
        raise UpcastError(
            f"the model returned a {type(output).__name__} without a floating-point tensor; there is nothing to "
            "compare. Pass metric=, which gets the outputs as they are."
        )
    return found


class PolicyRunner:
    """A model that can be run under any policy.

    Attributes:
        root: the module.
        module: what is called: the root, unless one of its modules is to be tried by itself.
        passes: forward passes so far.
    """

    def __init__(self, root: nn.Module, selection: Selection) -> None:
        self.root, self.module, self.selection = root, root, selection
        self.passes = 0
        self._seed: Tensor | None = None  # the random state in which every pass begins, of a model that draws

    def run(self, policy: Policy, sample: Sample, observer: Observer | None = None, *, gradients: bool = False) -> Any:
        """Return the model's output under ``policy``."""
        module_scope.change(self.root, self.selection, policy)
        self.passes += 1
        if self._seed is not None:
            torch.set_rng_state(self._seed)
        with (
            scopes.attribute(self.selection, "observer", observer),
            torch.set_grad_enabled(gradients),
            unobserved(),
        ):
            return self.module(*sample[0], **sample[1])

    def reference(self, sample: Sample, observer: Observer | None = None) -> Any:
        """Return the model's output in float32; if that fails, it is not float16's fault: say so and stop.

        Raises:
            UpcastError: it fails, or it draws random numbers in training mode. Those of a model in eval mode are drawn
                from the same random state in every pass.
        """
        before = torch.get_rng_state()
        try:
            output = self.run(SAFE, sample, observer)
        except UpcastError:
            raise
        except Exception as error:
            raise UpcastError(
                f"{type(self.root).__name__} fails in float32 already: {type(error).__name__}: {error}. Make "
                "model(...) run with these inputs first."
            ) from error
        if self._seed is None and not torch.equal(before, torch.get_rng_state()):
            _refuse_drawing(self.root)
            self._seed = before
        return output

    def finite_reference(self, sample: Sample, observer: Observer | None = None, which: str = "") -> Tensor:
        """Return the tensor that float32's output is judged by, a copy in float32.

        Raises:
            UpcastError: as `reference`; some of its numbers are not finite: the message names where, and the sample
                as ``which`` has it.
        """
        value = answer(self.reference(sample, observer)).float()
        if all_finite(value):
            return value.clone()
        findings = RangeObserver(math.inf)
        self.run(SAFE, sample, findings.in_float32)
        raise UpcastError(
            f"{type(self.root).__name__} is not finite in float32 already{which}, first in "
            f"{findings.first_nonfinite or 'its inputs'}{_broken_weights(self.root)}; no policy can cure that. Check "
            "weights and inputs."
        )


@contextmanager
def progress(run: PolicyRunner, passes: int, what: str) -> Iterator[None]:
    """Within the block, show how far ``passes`` of the model have come, where somebody looks on.

    A pass of a long text takes long: the modules that have run are counted, not the passes.
    """
    leaves = {id(module) for module in modules(run.module) if not module._modules}
    with console.Progress(max(len(leaves), 1) * passes, what, unit="module") as bar:
        if not bar.shown:
            yield
            return
        hook = register_module_forward_hook(lambda module, *_: bar.advance() if id(module) in leaves else None)
        try:
            yield
        finally:
            hook.remove()


@contextmanager
def trial(model: object, *, training: bool = False) -> Iterator[PolicyRunner]:
    """Give the model, patched or not, as one that runs under any policy; afterwards it is as it was.

    Raises:
        UpcastError: it cannot be patched; or it is in training mode with layers that draw at random or learn, and the
            caller does not say, by ``training``, that it takes care of those.
    """
    root = unwrap(model)
    if not training:
        _refuse_training(root)
    if not any(isinstance(parameter, HalfWeight) for parameter in root.parameters()):
        with engine.borrowed(root, policy=NONE, trial=True) as record:
            assert record.selection is not None
            yield PolicyRunner(root, record.selection)
        return
    record = engine.record_of(root)
    if record.selection is not None:
        selection, policy = record.selection, record.selection.policy
        try:
            yield PolicyRunner(root, selection)
            module_scope.change(root, selection, policy)
        except BaseException:  # an interruption of the line above, too
            module_scope.change(root, selection, policy)
            raise
        return
    selection = Selection(SAFE)
    try:
        module_scope.install(root, selection)
        yield PolicyRunner(root, selection)
        module_scope.remove(root)
    except BaseException:
        module_scope.remove(root)
        raise


def _refuse_training(root: nn.Module) -> None:
    for name, module in named_modules(root):
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise UpcastError(
                f"{type(root).__name__} is in training mode, where {name} ({type(module).__name__}) gives another "
                "result each time; two passes can be compared only if they do the same. Call model.eval() first."
            )


def _refuse_drawing(root: nn.Module) -> None:
    """Refuse dropout that is no layer: a function, or inside attention and recurrent layers."""
    if any(module.training for module in modules(root)):
        raise UpcastError(
            f"{type(root).__name__} is in training mode and draws random numbers, as dropout does; two passes can be "
            "compared only if they do the same. Call model.eval() first."
        )


def _broken_weights(root: nn.Module) -> str:
    for name, tensor in root.named_parameters():
        plain = tensor.memory() if isinstance(tensor, HalfWeight) else tensor
        if plain.is_floating_point() and not all_finite(plain):
            return f" ({name} itself is not finite)"
    return ""

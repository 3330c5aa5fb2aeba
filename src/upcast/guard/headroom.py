"""Headroom in training: every so many steps, how far the numbers of each block are from float16's end.

The arguments of one forward pass are remembered, and after the step that pass is run once more, without gradients, with
the eyes of `upcast.diagnose` on it. All other steps cost nothing.
"""

import math
import re
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from upcast.analysis.range_observer import OpStats, RangeObserver
from upcast.analysis.runner import Sample, trial
from upcast.core import messages
from upcast.core.errors import UpcastError
from upcast.core.module_tree import modules
from upcast.guard.snapshot import State
from upcast.kernels.reference import FLOAT16_MAX
from upcast.patching.discovery import unwrap
from upcast.patching.engine import is_patched, record_of

_BLOCK = re.compile(r"((?:.*?\.)?\d+)(\.|$)")  # "transformer.h.3.mlp.proj": the block is "transformer.h.3"


class Headroom:
    """Measures the headroom of a patched model's blocks while it is trained.

    Call `step` after each step of the optimizer::

        headroom = upcast.Headroom(model, every=100)
        for batch in data:
            ...
            optimizer.step()
            figures = headroom.step()  # a dict on the first step and on every hundredth after it, else None

    Args:
        model: a patched model, or what contains one (a PEFT model, a LightningModule).
        every: measure one of so many steps.

    Raises:
        UpcastError: nothing in ``model`` is patched, or ``every`` is below 1.

    Examples:
        >>> base, head = torch.nn.Linear(8, 8).requires_grad_(False), torch.nn.Linear(8, 2)
        >>> model = upcast.patch(torch.nn.Sequential(base, head))
        >>> optimizer = torch.optim.AdamW(head.parameters())
        >>> headroom = upcast.Headroom(model, every=100)
        >>> model(torch.randn(4, 8)).sum().backward()
        >>> optimizer.step()
        >>> "headroom/least" in headroom.step()
        True
        >>> headroom.close()
    """

    def __init__(self, model: object, every: int = 100) -> None:
        if every < 1:
            raise UpcastError(f"every={every}; headroom is measured on one of so many steps. Use 1 or more.")
        root = unwrap(model)
        patched = next((module for module in modules(root) if is_patched(module)), None)
        if patched is None:
            raise UpcastError(
                f"{type(root).__name__} holds no patched model, so there is nothing in float16 to measure. Call "
                "upcast.patch(model) before training; upcast.diagnose measures a model that is not patched."
            )
        self.module, self.every, self.steps = patched, every, 0
        self.sites: list[OpStats] = []
        self._closed = False
        self._sample: Sample | None = None
        self._handle: Any = None
        self._arm()

    def step(self, number: int | None = None) -> dict[str, float] | None:
        """Count a step; on one that is due, return bits of headroom per block, and say the least in one line.

        Keys are ``headroom/BLOCK``, and ``headroom/least``. 0 bits is 65504, where float16 ends; a block with numbers
        that are not finite has -inf.

        Args:
            number: which step this was, counted from 1; None: the one after the last.
        """
        self.steps = self.steps + 1 if number is None else number
        sample, self._sample = self._sample, None
        figures = None if sample is None else self._measured(sample)
        if self.steps % self.every == 0 and not self._closed:
            self._arm()
        return figures

    def close(self) -> None:
        """Measure no more."""
        self._closed = True
        self._disarm()
        self._sample = None

    def _disarm(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _arm(self) -> None:
        self._disarm()
        self._handle = self.module.register_forward_pre_hook(_Remember(self), with_kwargs=True)

    def remember(self, args: Any, kwargs: Any) -> None:
        """Take the arguments of a forward pass for the next measurement."""
        if torch.is_grad_enabled():  # else it is an evaluation in between
            self._disarm()
            self._sample = pytree.tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))

    def _measured(self, sample: Sample) -> dict[str, float]:
        found = RangeObserver(math.inf)
        state = State((), {}, self.module)
        try:
            with trial(self.module, training=True) as run:
                run.run(record_of(self.module).policy, sample, found.in_float32)
        finally:
            state.restore()
        self.sites = list(found.sites.values())
        worst = _worst(self.sites)
        bits = {block: site.headroom for block, site in worst.items()}
        if found.first_nonfinite:
            bits[block_of(found.first_nonfinite.partition(": ")[0])] = -math.inf
        self._say(worst, found.first_nonfinite)
        return {f"headroom/{block}": each for block, each in [*bits.items(), ("least", min(bits.values()))]}

    def _say(self, worst: dict[str, OpStats], nonfinite: str) -> None:
        least = min(worst.values(), key=lambda site: site.headroom)
        where = f"{least.module or '(the model itself)'}: {least.what}, {least.largest:,.0f} of {FLOAT16_MAX:,.0f}"
        bad = f"a number that is not finite, first in {nonfinite}; else " if nonfinite else ""
        messages.say(f"step {self.steps}: {bad}least headroom {least.headroom:+.1f} bits, in {where}")


class _Remember:
    """The hook of a model that is measured; it does not keep its Headroom, and a copy of the model has none."""

    def __init__(self, headroom: Headroom | None = None) -> None:
        self._headroom = None if headroom is None else weakref.ref(headroom)

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        headroom = None if self._headroom is None else self._headroom()
        if headroom is not None:
            headroom.remember(args, kwargs)

    def __reduce__(self) -> Any:
        return (_Remember, ())


def block_of(module: str) -> str:
    """Return the block that a module is part of: its name up to the first number, or the whole name."""
    found = _BLOCK.match(module)
    return found.group(1) if found else module or "model"


def _worst(sites: list[OpStats]) -> dict[str, OpStats]:
    """Return block -> its operation with the largest numbers, in order of execution."""
    worst: dict[str, OpStats] = {}
    for site in sites:
        block = block_of(site.module)
        if site.largest and (block not in worst or site.largest > worst[block].largest):
            worst[block] = site
    return worst

"""One row of the coverage table: forward and generation against float32, and what had to be upcast whole."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import upcast
from tests.coverage_table.case import Case, Inputs
from upcast.patching.engine import record_of
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.store import Fallbacks

FORWARD_ERROR = 1e-5
CACHED_ERROR = 5e-4  # the cache is float16
LARGEST_COPY = 4 << 20
MASKED = 1e30


@dataclass
class Row:
    """What one architecture did.

    Attributes:
        forward: relative error of the outputs.
        generated: relative error of the logits of ``generate``, or None if the model does not generate.
        before, after: bytes of the tensors, as the plan counts them.
        fused: the kinds of fused forward that the model got.
        upcast: operation and weight -> bytes of the float32 copy, at the published size where that is known.
        failure: an exception, in words.
    """

    case: Case
    forward: float = float("nan")
    generated: float | None = None
    before: int = 0
    after: int = 0
    fused: tuple[str, ...] = ()
    upcast: dict[str, int] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> str:
        """Why the row is not green, or an empty string."""
        if self.failure:
            return self.failure
        if not self.forward <= FORWARD_ERROR:
            return f"forward differs by {self.forward:.1e}"
        if self.generated is not None and not self.generated <= CACHED_ERROR:
            return f"generate differs by {self.generated:.1e}"
        large = {name: size for name, size in self.upcast.items() if size > LARGEST_COPY}
        return "".join(f"{name} makes a float32 copy of {size / 1e6:.0f} MB" for name, size in large.items())


def measure(case: Case) -> Row:
    """Return the row of ``case``; an exception becomes its failure."""
    start, row = time.perf_counter(), Row(case)
    try:
        torch.manual_seed(0)
        _fill(row, case)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        row.failure = f"{type(error).__name__}: {first[:160]}"
    row.seconds = time.perf_counter() - start
    return row


def _fill(row: Row, case: Case) -> None:
    model = unsettled(case.build().eval().requires_grad_(False))  # IDEFICS freezes parts: the rest would learn
    inputs = case.inputs(model)
    reference = rounded(model)
    wanted, wanted_logits = outputs(reference, inputs), generated(reference, case, inputs)
    del reference
    upcast.patch(model)
    watched = watch(model)
    got, got_logits = outputs(model, inputs), generated(model, case, inputs)
    row.forward = relative_error(got, wanted)
    row.generated = relative_error(got_logits, wanted_logits) if wanted_logits else None
    plan = record_of(model).plan
    row.before, row.after = plan.bytes_before, plan.bytes_after
    row.fused = fused_kinds(model)
    row.upcast = copies(case, watched)
    if not any(isinstance(parameter, HalfWeight) for parameter in model.parameters()):
        row.failure = "nothing is stored in float16"


def unsettled(model: nn.Module) -> nn.Module:
    """Give every layer weight: freshly made models have tiny matrices and zeros for vectors, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if parameter.dim() >= 2 and parameter.std() < 0.03:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rounded(model: nn.Module) -> nn.Module:
    """Return a float32 copy of ``model`` whose weights are rounded to float16."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point():
                parameter.copy_(parameter.half().float())
    return model


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return every floating-point tensor in the output of one forward pass."""
    torch.manual_seed(0)
    with torch.inference_mode():
        return [tensor.clone() for tensor in floating(model(**inputs))]


def generated(model: Any, case: Case, inputs: Inputs) -> list[Tensor]:
    """Return the logits of all tokens of a greedy generation, as one tensor; nothing if the model does not generate."""
    if case.generate is None:
        return []
    torch.manual_seed(0)
    with torch.inference_mode():
        steps = case.generate(model, copy.deepcopy(inputs))  # BLIP's writes into its prompt
    return [torch.cat([step.flatten() for step in steps])] if steps else []


def floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in an output, however it nests."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from floating(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from floating(part)


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest error of the tensors, each as the norm of the difference over the norm of the wanted one."""
    if len(got) != len(wanted) or not wanted:
        return float("inf")
    return max(_error(one.double(), other.double()) for one, other in zip(got, wanted, strict=True))


def _error(got: Tensor, wanted: Tensor) -> float:
    usable = wanted.abs() < MASKED  # masked logits are -inf, or close to float32's smallest number, on both sides
    if got.shape != wanted.shape or not torch.equal(got.abs() < MASKED, usable):
        return float("inf")
    got, wanted = got[usable], wanted[usable]
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


# --- what was upcast whole -------------------------------------------------------------------------------------------


def watch(model: nn.Module) -> dict[str, Fallbacks]:
    """Give each weight a count of its own, so that a float32 copy names the weight it was made of."""
    watched = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, HalfWeight):
            watched[name] = parameter.store.fallbacks = Fallbacks()
    return watched


def copies(case: Case, watched: dict[str, Fallbacks]) -> dict[str, int]:
    """Return "operation of weight" -> bytes of the copy, of the whole weight at its published size."""
    used = {(op, name): size for name, count in watched.items() for op, size in count.largest.items()}
    sizes = _published(case) if used else {}
    return {f"{op} of {name}": sizes.get(name, size) for (op, name), size in used.items()}


def _published(case: Case) -> dict[str, int]:
    if case.full is None:
        return {}
    with torch.device("meta"):
        return {name: 4 * parameter.numel() for name, parameter in case.full().named_parameters()}


def fused_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the fused forwards in ``model``."""
    kinds = {type(module.__dict__["forward"]).__name__ for module in model.modules() if "forward" in module.__dict__}
    return tuple(sorted(kind for kind in kinds if kind.startswith("Fused")))

"""One row of the coverage table before it is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

IDS = torch.arange(3, 17).view(2, 7)


def tokens(_: nn.Module) -> Inputs:
    """Two prompts of seven tokens."""
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def noise(*shape: int) -> Tensor:
    """Seeded noise of a standard deviation of one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


GENERATION: Inputs = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def greedy(**options: Any) -> Callable[[Any, Inputs], list[Tensor]]:
    """Return what generates with Transformers' ``generate`` and gives the logits of each token."""

    def generate(model: Any, inputs: Inputs) -> list[Tensor]:
        if not model.can_generate():
            return []
        prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        return list(model.generate(**prompt, **{**GENERATION, **options}).logits)

    return generate


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        group: the part of the table that it belongs to.
        name: its row.
        build: returns a tiny instance with random weights.
        inputs: what its forward gets.
        generate: returns the logits of a greedy generation, nothing for a model that cannot; or None.
        full: returns the module at its published size, on the meta device; None where there is no default size.
        fast: whether the row is part of ``make test``.
        note: what a reader should know.
    """

    group: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs] = tokens
    generate: Callable[[Any, Inputs], list[Tensor]] | None = None
    full: Callable[[], nn.Module] | None = None
    fast: bool = False
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """An architecture that has no row, and why."""

    group: str
    name: str
    cause: str

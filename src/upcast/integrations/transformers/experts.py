"""Transformers' experts that lie in one parameter: those that a token chose, in one native call.

Many families have the code of Mixtral's. Which of Transformers' implementations the config names does not matter: they
compute the same.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from upcast.integrations.experts import Specs, in_one_call
from upcast.integrations.module_snapshot import Members
from upcast.integrations.transformers.modules import TransformersForward, activation
from upcast.kernels.block_spec import STORAGES, ExpertSpec, Matrix
from upcast.kernels.packed_matrix import PackedExperts, PackedMatrix
from upcast.tensor.genuine import Root, Table, calls, forwards
from upcast.tensor.half_weight import HalfWeight

_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class FusedExperts(TransformersForward):
    """MixtralExperts, and those like it, in inference."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._known: tuple[Members, Specs] | None = None  # replaced whole: threads share it

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """The activation is not called, and neither is an implementation of Transformers'."""
        return _roots, type(module), type(module.act_fn)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}  # a copy collects its own

    def fused(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """Return the weighted sum (T, C) of what the chosen experts give for hidden_states (T, C)."""
        name = activation(self.module) if self._fit(hidden_states, top_k_index, top_k_weights) else None
        if name is not None:
            y = in_one_call(hidden_states, top_k_index, top_k_weights, self._specs(), name)
            if y is not None:
                self.calls += 1
                return y
        return self.unfused(hidden_states, top_k_index, top_k_weights)

    def _fit(self, x: Tensor, indices: Tensor, weights: Tensor) -> bool:
        if not self.free(x) or type(indices) is not Tensor or type(weights) is not Tensor:
            return False
        if torch.is_grad_enabled() and weights.requires_grad:
            return False
        named = self.module.config._experts_implementation in _IMPLEMENTATIONS
        return named and weights.dtype is torch.float32 and _plain_gate(type(self.module))

    def _specs(self) -> Specs:
        known = self._known
        if known is None or not known[0].same():
            self._known = known = Members([self.module]), _specs(self.module)
        return known[1]


def _specs(module: Any) -> Specs:
    """Return what the experts are made of; nothing for others than the native call knows."""
    both, down = (_matrices(module._parameters.get(name)) for name in ("gate_up_proj", "down_proj"))
    if not both or len(both) != len(down):
        return ()
    width = both[0].rows // 2
    return tuple(
        ExpertSpec(_rows(two, 0, width), _rows(two, width, width), last) for two, last in zip(both, down, strict=True)
    )


def _matrices(weight: Any) -> list[Matrix]:
    """Return the matrices (E, N, K) of a stored weight; nothing for another."""
    if not isinstance(weight, HalfWeight) or weight.dim() != 3 or not weight.store.held:
        return []
    held = weight.operand
    if isinstance(held, Tensor):
        return [Matrix(each) for each in held] if held.dtype is torch.float16 else []
    if not isinstance(held, PackedExperts) or held.transposed:
        return []
    return [Matrix(held.of(i), None, STORAGES["packed"]) for i in range(held.experts)]


def _rows(matrix: Matrix, begin: int, count: int) -> Matrix:
    weight = matrix.weight
    if isinstance(weight, PackedMatrix):
        return matrix._replace(weight=weight.narrow_rows(begin, count))
    assert weight is not None
    return matrix._replace(weight=weight[begin : begin + count])


def _plain_gate(kind: type) -> bool:
    """Whether a class of experts has no gating of its own."""
    return getattr(kind, "_apply_gate", None) is _default_gate()


@functools.cache
def _default_gate() -> Any:
    from transformers.integrations import moe

    return getattr(moe, "_default_apply_gate", None)  # versions that have none give no class one


def _roots(experts: type, act: type) -> list[Root]:
    from transformers.integrations import moe

    roots: list[Root] = [*forwards(experts), *calls(act)]
    table = moe.ALL_EXPERTS_FUNCTIONS
    for each in (getattr(table, "_local_mapping", None), getattr(table, "_global_mapping", None)):
        if isinstance(each, dict):
            roots += [(Table(each, "transformers"), name) for name in _IMPLEMENTATIONS[1:]]
    return roots

"""LitGPT's mixture of experts: the experts that a token chose, and no others, in one native call."""

from typing import Any

import torch
from torch import Tensor, nn

from upcast.integrations.experts import Specs, in_one_call
from upcast.integrations.fused import UnknownLayer, fuses, matrix
from upcast.integrations.litgpt.modules import FusedGatedMLP, LitGPTForward
from upcast.integrations.litgpt.versions import setting
from upcast.integrations.module_snapshot import Members
from upcast.kernels.block_spec import ExpertSpec
from upcast.tensor.genuine import calls, originals


class FusedMoE(LitGPTForward):
    """LLaMAMoE in inference. LitGPT's own forward calls every expert, most of them with no token at all.

    Experts that the native call does not know are called as modules, in LitGPT's order, so that sums round alike.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._experts: Experts | None = None  # replaced whole: threads share it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_experts": None}  # a copy collects its own

    def fused(self, x: Tensor) -> Any:
        """Return the weighted sum of the experts' outputs for x (B, T, C)."""
        experts = self._current() if self.free(x) else None
        moe = self.module
        if experts is None or experts.count != moe.config.n_expert or experts.watched():
            return self.unfused(x)
        rows = x.reshape(-1, x.shape[-1])
        weights, indices = self._routed(rows)
        factor = setting(moe.config, "routed_scaling_factor")
        if factor != 1.0:
            weights = weights * factor
        self.calls += 1
        y = experts.in_one_call(rows, indices, weights)
        if y is None:
            y = _one_by_one(moe.experts, rows, indices, weights)
        y = y.view(x.shape)
        return y + moe.shared_experts(x) if setting(moe.config, "n_shared_expert") else y

    def _routed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (rows, chosen) and the experts (rows, chosen) of every row."""
        moe = self.module
        if setting(moe.config, "n_expert_groups"):
            found: tuple[Tensor, Tensor] = moe.gate(rows)
            return found
        scores, indices = torch.topk(moe.gate(rows), moe.config.n_expert_per_token)
        return scores.softmax(dim=1, dtype=torch.float32), indices

    def _current(self) -> "Experts":
        experts = self._experts
        if experts is None or not experts.same():
            self._experts = experts = Experts(self.module.experts)
        return experts


def _one_by_one(experts: Any, rows: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return (rows, C): what the chosen ones of ``experts``, called as modules, add up to."""
    y = torch.zeros_like(rows)
    for expert in sorted(set(indices.flatten().tolist())):
        token, choice = torch.where(indices == expert)
        y[token] += weights[token, choice, None] * experts[expert](rows[token])
    return y


class Experts(Members):
    """The experts of a mixture as they are now, and what the native call takes of them."""

    def __init__(self, experts: nn.ModuleList) -> None:
        inside = [*experts.modules()]
        super().__init__(inside)
        self.count = len(experts)
        self._specs, self._activation = _specs([experts[i] for i in range(self.count)])
        self._originals = originals(calls, *dict.fromkeys(map(type, inside[1:])))

    def in_one_call(self, rows: Tensor, indices: Tensor, weights: Tensor) -> Tensor | None:
        """Return the weighted sum (rows, C) of the experts that ``indices`` names; None where a module has to run."""
        if not self._originals.intact():
            return None
        return in_one_call(rows, indices, weights, self._specs, self._activation)


def _specs(mlps: list[nn.Module]) -> tuple[Specs, str]:
    """Return what experts are made of, and their activation; nothing for others than the native call knows."""
    activations = {mlp.__dict__["forward"].activation for mlp in mlps if fuses(mlp, FusedGatedMLP)}
    try:
        if len(activations) != 1 or not all(fuses(mlp, FusedGatedMLP) for mlp in mlps):
            raise UnknownLayer
        found = [ExpertSpec(*(matrix(getattr(mlp, name)) for name in FusedGatedMLP.layers)) for mlp in mlps]
    except UnknownLayer:
        return (), ""
    return tuple(found), activations.pop()

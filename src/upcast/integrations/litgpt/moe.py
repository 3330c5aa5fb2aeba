"""LitGPT's mixture of experts: the experts that a token chose are called, and no others."""

from typing import Any

import torch
from torch import Tensor, nn

from upcast.integrations.litgpt.modules import LitGPTForward
from upcast.integrations.litgpt.versions import setting
from upcast.integrations.module_snapshot import Members


class FusedMoE(LitGPTForward):
    """LLaMAMoE in inference. LitGPT's own forward calls every expert, most of them with no token at all.

    The chosen ones are called as modules, in LitGPT's order, so that sums round alike.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.members: Members | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "members": None}  # a copy collects its own

    def fused(self, x: Tensor) -> Any:
        """Return the weighted sum of the experts' outputs for x (B, T, C)."""
        if not self.free(x) or self._watched():
            return self.unfused(x)
        moe = self.module
        rows = x.reshape(-1, x.shape[-1])
        weights, indices = self._routed(rows)
        factor = setting(moe.config, "routed_scaling_factor")
        if factor != 1.0:
            weights = weights * factor
        self.calls += 1
        y = torch.zeros_like(rows)
        for expert in sorted(set(indices.flatten().tolist())):
            token, choice = torch.where(indices == expert)
            y[token] += weights[token, choice, None] * moe.experts[expert](rows[token])
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

    def _watched(self) -> bool:
        """Whether someone watches an expert, and expects to be called with no token as well."""
        if self.members is None or not self.members.same():
            self.members = Members([*self.module.experts.modules()])
        return self.members.watched()

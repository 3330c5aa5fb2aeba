"""LitGPT's mixture of experts: the experts that a token chose, and no others, in one native call."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upcast.core import torch_private
from upcast.integrations.experts import in_one_call
from upcast.integrations.fused import UnknownLayer, fuses, matrix
from upcast.integrations.litgpt.modules import FusedGatedMLP, LitGPTForward
from upcast.integrations.litgpt.versions import setting
from upcast.integrations.module_snapshot import Members
from upcast.kernels import mixture, native
from upcast.kernels.block_spec import ExpertSpec, Matrix, Norm
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
        moe = self.module
        if not self.complete() or not self.free(x):
            return self.unfused(x)
        rows = x.reshape(-1, x.shape[-1])
        weights, indices = self._routed(rows)
        factor = setting(moe.config, "routed_scaling_factor")
        if factor != 1.0:
            weights = weights * factor
        self.calls += 1
        y = self._mixed(rows, indices, weights).view(x.shape)
        return y + moe.shared_experts(x) if setting(moe.config, "n_shared_expert") else y

    def complete(self) -> bool:
        """Whether there are as many experts as the config says; LitGPT leaves others out."""
        moe = self.module
        return type(moe.experts) is nn.ModuleList and len(moe.experts) == moe.config.n_expert

    def simple_gate(self) -> Matrix | None:
        """Return the gate where the experts' outputs, weighted by the softmax of the best scores, are all there is."""
        moe = self.module
        more = [setting(moe.config, name) for name in ("n_expert_groups", "n_shared_expert")]
        if any(more) or setting(moe.config, "routed_scaling_factor") != 1.0:
            return None
        try:
            return matrix(moe.gate)
        except UnknownLayer:
            return None

    def after(self, x: Tensor, norm: Norm, gate: Matrix) -> Tensor:
        """Return x (B, T, C) plus what the experts give for its ``norm``, where there is a `simple_gate`."""
        rows = x.reshape(-1, x.shape[-1])
        normed, indices, weights = mixture.route(rows, norm, gate, self.module.config.n_expert_per_token)
        self.calls += 1
        return self._mixed(normed, indices, weights, rows).view(x.shape)

    def _mixed(self, rows: Tensor, indices: Tensor, weights: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return (rows, C), by one native call where it knows the experts and nobody watches one."""
        chosen = sorted(set(indices.flatten().tolist()))
        experts = self._experts
        if experts is None or not experts.same(chosen):
            self._experts = experts = Experts(self.module.experts)
        if experts.watched():
            chosen = [*range(len(self.module.experts))]  # who watches expects to be called with no token as well
        else:
            y = experts.in_one_call(rows, chosen, indices, weights, residual)
            if y is not None:
                return y
        y = _one_by_one(self.module.experts, chosen, rows, indices, weights)
        return y if residual is None else residual + y

    def _routed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights (rows, chosen) and the experts (rows, chosen) of every row."""
        moe = self.module
        if setting(moe.config, "n_expert_groups"):
            found: tuple[Tensor, Tensor] = moe.gate(rows)
            return found
        scores, indices = torch.topk(moe.gate(rows), moe.config.n_expert_per_token)
        return scores.softmax(dim=1, dtype=torch.float32), indices


def _one_by_one(experts: Any, chosen: list[int], rows: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return (rows, C): what the ``chosen`` ones of ``experts``, called as modules, add up to."""
    y = torch.zeros_like(rows)
    for expert in chosen:
        token, choice = torch.where(indices == expert)
        y[token] += weights[token, choice, None] * experts[expert](rows[token])
    return y


_LOOKS = 2


class Expert(NamedTuple):
    """One expert as it is now, and what the native call takes of it; nothing of one that it does not know."""

    members: Members
    spec: ExpertSpec | None
    activation: str


class Experts:
    """The experts of a mixture as they are now, each looked at when it is chosen.

    A look at all of 128 takes as long as a tenth of what a token's experts compute.
    """

    def __init__(self, experts: nn.ModuleList) -> None:
        self._modules = [experts[i] for i in range(len(experts))]
        self._list = Members([experts])
        self._known: dict[int, Expert] = {}
        inside = [module for each in self._modules for module in each.modules()]
        self._originals = originals(calls, *dict.fromkeys(map(type, inside)))
        self._hooks = [module.__dict__[name] for module in inside for name in ("_forward_hooks", "_forward_pre_hooks")]
        self._looked: tuple[int | None, int] = None, 0  # at how many hooks of all modules nobody watched, how often

    def same(self, chosen: list[int]) -> bool:
        """Whether nothing was replaced since, of the ``chosen`` ones."""
        known = self._known
        return self._list.same() and all(known[each].members.same() for each in chosen if each in known)

    def watched(self) -> bool:
        """Whether someone watches one of the experts. Two looks that find nobody hold until there is another hook.

        One does not: a hook is counted before it is in its place, and another thread may look between.
        """
        count, (known, times) = torch_private.hooks_so_far(), self._looked
        if count is None or count != known or times < _LOOKS:
            empty = native.all_empty(self._hooks)
            self._looked = count, (times + 1 if count == known else 1) if empty else 0
            if not empty:
                return True
        return torch_private.any_global_hook()

    def in_one_call(
        self, rows: Tensor, chosen: list[int], indices: Tensor, weights: Tensor, residual: Tensor | None
    ) -> Tensor | None:
        """Return the weighted sum (rows, C) of the ``chosen`` experts; None where a module has to run."""
        specs: list[ExpertSpec | None] = [None] * len(self._modules)
        for each in chosen:
            if each not in self._known:
                self._known[each] = _look(self._modules[each])
            specs[each] = self._known[each].spec
            if specs[each] is None or self._known[each].activation != self._known[chosen[0]].activation:
                return None
        if not chosen or not self._originals.intact():
            return None
        activation = self._known[chosen[0]].activation
        return in_one_call(rows, indices, weights, tuple(specs), activation, residual)


def _look(mlp: Any) -> Expert:
    members = Members([*mlp.modules()])
    try:
        if not fuses(mlp, FusedGatedMLP):
            raise UnknownLayer
        spec = ExpertSpec(*(matrix(getattr(mlp, name)) for name in FusedGatedMLP.layers))
    except UnknownLayer:
        return Expert(members, None, "")
    return Expert(members, spec, mlp.__dict__["forward"].activation)

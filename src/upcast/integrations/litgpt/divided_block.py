"""A LitGPT block of which every rank has a part: what the ranks computed is added up between its halves."""

from typing import Any

from torch import Tensor, nn

from upcast.core.forward_override import Forward
from upcast.distributed.collectives import Group


class DividedBlock(Forward):
    """The forward of ``block``; ``together``: both halves read the same input, and one sum serves both."""

    owner = "divided"  # it stays where a model is unpatched: each rank has a part of it

    def __init__(self, block: Any, group: Group) -> None:
        super().__init__(block)
        self.group = group
        norms = (block.post_attention_norm, block.post_mlp_norm)
        self.together = bool(block.config.parallel_residual) and all(isinstance(norm, nn.Identity) for norm in norms)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Any:
        block: Any = self.module
        settings = block.config
        normed = block.norm_1(x)
        attended = block.attn(normed, cos, sin, mask, input_pos, input_pos_maxp1)
        if not self.together:
            attended = self.after_attention(attended, x)
        if not settings.shared_attention_norm:
            normed = block.norm_2(x if settings.parallel_residual else attended)
        if self.together:
            return self.group.sum(attended + block.mlp(normed)) + x
        return self.after_mlp(block.mlp(normed), attended)

    def after_attention(self, branch: Tensor, x: Tensor) -> Any:
        """Return what goes on after the first half, from this rank's ``branch`` of it and its input."""
        return self.module.post_attention_norm(self.group.sum(branch)) + x

    def after_mlp(self, branch: Tensor, x: Tensor) -> Any:
        """Return what goes on after the second half."""
        return self.module.post_mlp_norm(self.group.sum(branch)) + x

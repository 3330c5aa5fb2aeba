"""Attention as LitGPT had it before 0.5.5: q, k and v of each group of heads lie side by side in one layer's output.

The native call for whole blocks takes all q, all k, all v; such a block runs part by part.
"""

from torch import Tensor

from upcast.integrations.litgpt.modules import FusedAttention


class FusedGroupedAttention(FusedAttention):
    """CausalSelfAttention whose layer is ``attn``; its cache has a head for every q, unless there is one k for all."""

    layer = "attn"
    angle_dims = 2  # (T, n)

    def cache_heads(self) -> int:
        """Return how many heads a cache has."""
        config = self.module.config
        return 1 if config.n_query_groups == 1 else int(config.n_head)

    def _heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv (B, T, C) into heads (B, H, T, D), turned; k and v have as many as a cache."""
        config = self.module.config
        groups, each = config.n_query_groups, config.n_head // config.n_query_groups
        q, k, v = qkv.view(*qkv.shape[:2], groups, each + 2, config.head_size).split((each, 1, 1), dim=3)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        q, k = self._turned(q, cos, sin), self._turned(k, cos, sin)
        repeats = self.cache_heads() // groups
        if repeats > 1:
            k, v = (part.repeat_interleave(repeats, dim=1) for part in (k, v))
        return q, k, v

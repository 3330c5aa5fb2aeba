"""LitGPT's LoRA on the joined q, k and v: the same sums as products of small matrices, where LitGPT has convolutions.

Those convolutions, of width one, cost more than the attention that follows them: a sixth of a step of training.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upcast.integrations.litgpt.modules import LitGPTForward
from upcast.kernels import transforms
from upcast.tensor import autocast


class FusedLoRAQKV(LitGPTForward):
    """LoRAQKVLinear of a float32 model, merged or not; its two matrices learn as they do without it."""

    def fused(self, x: Tensor) -> Any:
        lora = self.module
        plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and not autocast.enabled()
        if not plain or transforms.active():
            return self.unfused(x)
        self.calls += 1
        pretrained = lora.linear(x)
        if lora.r == 0 or not any(lora.enable_lora) or lora.merged:
            return pretrained
        narrow = F.linear(lora.lora_dropout(x), lora.lora_A).chunk(sum(lora.enable_lora), dim=-1)
        adapted = iter(zip(narrow, lora.lora_B.split(lora.qkv_shapes), strict=True))
        groups = lora.head_size * lora.n_query_groups
        parts = pretrained.split((pretrained.shape[-1] - 2 * groups, groups, groups), dim=-1)
        return torch.cat([self._add(part, *next(adapted)) if enabled else part
                          for part, enabled in zip(parts, lora.enable_lora, strict=True)], dim=-1)  # fmt: skip

    def _add(self, part: Tensor, narrow: Tensor, weight: Tensor) -> Tensor:
        return torch.add(part, F.linear(narrow, weight), alpha=self.module.scaling)

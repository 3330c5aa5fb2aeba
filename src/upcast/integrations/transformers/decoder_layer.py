"""One native call per decoder layer and token: Transformers' layers of the Llama kind over a float16 cache.

A prompt, a batch that is padded, a layer that someone watches, and all that trains or traces run the forwards of
`modules`, one by one, which give the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core.errors import KernelError
from upcast.integrations.fused import UnknownLayer, fuses, matrix, rms_norm
from upcast.integrations.module_snapshot import Members
from upcast.integrations.transformers.kv_cache import growing
from upcast.integrations.transformers.modules import (
    FusedAttention,
    FusedGatedMLP,
    FusedRMSNorm,
    TransformersForward,
    activation,
    attention_roots,
    turns,
    wide,
)
from upcast.integrations.transformers.versions import cache_name
from upcast.kernels import native, transforms
from upcast.kernels.block_spec import ACTIVATIONS, BlockSpec, Norm
from upcast.tensor import autocast
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT
from upcast.tensor.genuine import Originals, Root, calls, originals

_NUMBERS = ("variance_epsilon", "scaling", "head_dim", "num_key_value_groups", "layer_idx")
# Whether gradients, autocast or a transformation want to see what is done; the profiler does without.
_QUESTIONS = [torch.is_grad_enabled, autocast.enabled, *transforms.questions()]
_OWNERS, _TOLD, _KEPT = map(list, zip(*transforms.flags(profiled=False), strict=True))


class FusedDecoderLayer(TransformersForward):
    """LlamaDecoderLayer for one new position per row, under SDPA and without a mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._known: tuple[Members, Originals, BlockSpec | None] | None = None  # replaced whole: threads share it

    def fused(
        self,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        angles: Any = kwargs.get("position_embeddings")
        usual = not args and kwargs.get("attention_mask") is None and wide(angles)
        if usual and self._token(hidden_states):
            y = self._in_one_call(hidden_states, angles, kwargs.get(cache_name()))
            if y is not None:
                self.calls += 1
                return y
        return self.unfused(hidden_states, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}  # a copy collects its own

    def _token(self, x: Tensor) -> bool:
        """Whether ``x`` (B, 1, C) is one position per row, in plain inference."""
        if transforms.dynamo() or not native.quiet(_QUESTIONS, _KEPT, _OWNERS, _TOLD):
            return False
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.dim() != 3 or x.shape[1] != 1:
            return False
        if native.prefers_torch(x.shape[0]):
            return False
        return x.is_cpu and x.is_contiguous() and not self.module.training and kernels.active() is native

    def _in_one_call(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """Return the layer's output, or None where the native call does not cover it; nothing has changed then."""
        spec = self._current_spec()
        if spec is None or not turns(angles, x, self.module.self_attn.head_dim):
            return None
        layer = growing(cache, self.module.self_attn.layer_idx) if _own(cache) else None
        room = None if layer is None else layer.reserve()
        if layer is None or room is None or room[0].shape[0] != x.shape[0]:
            return None
        keys, values, rows = room
        try:
            y = native.block(x, *angles, keys, values, spec, (rows, rows))
        except KernelError:  # a vector that was converted in place, say: torch has a result, or its error
            return None
        if y is not None:
            layer.advance(rows + 1)
        return y

    def _current_spec(self) -> BlockSpec | None:
        """Return what the layer is made of, or None if it has what the native call does not know."""
        known = self._known
        if known is None or not known[0].same():
            inside = [module for module in self.module.modules() if module is not self.module]
            code = originals(_roots, *dict.fromkeys(map(type, inside)))
            self._known = known = Members(inside, also=(self.module,), names=_NUMBERS), code, _spec(self.module)
        members, code, spec = known
        if spec is None or self.module.self_attn.config._attn_implementation != "sdpa":
            return None
        return spec if not members.watched() and code.intact() else None


def _roots(*kinds: type) -> list[Root]:
    """Return what a layer of modules of these kinds runs, as the native call leaves it out."""
    return [*calls(*kinds), *attention_roots(*kinds)]


def _own(cache: Any) -> bool:
    """Whether ``cache`` takes keys and values as Transformers' own caches do."""
    kind: type = type(cache)
    return "update" not in cache.__dict__ and originals(_cache_roots, kind).intact()


def _cache_roots(cache: type) -> list[Root]:
    from transformers import cache_utils

    return [(cache, "update"), (cache_utils.Cache, "update"), (cache_utils.DynamicLayer, "update")]


def _spec(layer: Any) -> BlockSpec | None:
    attn, mlp = layer.self_attn, layer.mlp
    gated = mlp.__dict__.get("forward")
    if not fuses(attn, FusedAttention) or not fuses(mlp, FusedGatedMLP) or activation(mlp) != gated.activation:
        return None
    try:
        query, key = matrix(attn.q_proj), matrix(attn.k_proj)
        return BlockSpec(
            heads=attn.q_proj.weight.shape[0] // attn.head_dim,
            groups=attn.k_proj.weight.shape[0] // attn.head_dim,
            head_width=attn.head_dim,
            norm_heads="q_norm" in attn._modules,
            parallel=False,
            shared=False,
            activation=ACTIVATIONS[gated.activation],
            scale=attn.scaling,
            softcap=0.0,
            window=0,
            qkv=query,
            key=key,
            value=matrix(attn.v_proj),
            proj=matrix(attn.o_proj),
            gate=matrix(mlp.gate_proj),
            up=matrix(mlp.up_proj),
            down=matrix(mlp.down_proj),
            norm_1=_norm(layer.input_layernorm),
            norm_2=_norm(layer.post_attention_layernorm),
            post_attention=Norm(),
            post_mlp=Norm(),
            norm_q=_norm(attn._modules.get("q_norm")),
            norm_k=_norm(attn._modules.get("k_norm")),
            key_limit=KEY_LIMIT,
            value_limit=VALUE_LIMIT,
        )
    except UnknownLayer:
        return None


def _norm(norm: Any) -> Norm:
    return Norm() if norm is None else rms_norm(norm, FusedRMSNorm, "variance_epsilon")

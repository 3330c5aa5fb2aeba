"""One native call per decoder layer: Transformers' layers of the Llama kind over a float16 cache that holds something.

A token, drafted tokens to be verified, a further chunk of a prompt. The first chunk, a batch that is padded, a layer
that someone watches, and all that trains or traces run the forwards of `modules`, one by one, which give the same.
"""

import threading
import weakref
from collections.abc import Sequence
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

NUMBERS = ("variance_epsilon", "scaling", "head_dim", "num_key_value_groups", "layer_idx")
# Whether gradients, autocast or a transformation want to see what is done; the profiler does without.
_QUESTIONS = [torch.is_grad_enabled, autocast.enabled, *transforms.questions()]
_OWNERS, _TOLD, _KEPT = map(list, zip(*transforms.flags(profiled=False), strict=True))


running = threading.local()  # .run: what this thread's forward of a model knows of its layers; see `layer_stack`


class FusedDecoderLayer(TransformersForward):
    """LlamaDecoderLayer for new positions after those of a cache, under SDPA, each of which sees all before it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._known: tuple[Members, Originals, BlockSpec | None] | None = None  # replaced whole: threads share it

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        run = getattr(running, "run", None)
        y = None if run is None else run.layer(self, hidden_states, args, kwargs)
        if y is not None:
            self.calls += 1
            return y
        return super().__call__(hidden_states, *args, **kwargs)

    def fused(
        self,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not args and self.fits_call(hidden_states, kwargs):
            y = self._in_one_call(hidden_states, kwargs)
            if y is not None:
                self.calls += 1
                return y
        return self.unfused(hidden_states, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}  # a copy collects its own

    def fits_call(self, x: Tensor, given: dict[str, Any]) -> bool:
        """Whether x (B, T, C), and the angles that come with it, are what the native call takes, in plain inference."""
        angles = given.get("position_embeddings")
        if transforms.dynamo() or not native.quiet(_QUESTIONS, _KEPT, _OWNERS, _TOLD) or not wide(angles):
            return False
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.dim() != 3 or not x.shape[1]:
            return False
        if native.prefers_torch(x.shape[0] * x.shape[1]) or not turns(angles, x, self.module.self_attn.head_dim):
            return False
        return x.is_cpu and x.is_contiguous() and not self.module.training and kernels.active() is native

    def _in_one_call(self, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Return the layer's output, or None where the native call does not cover it; nothing has changed then."""
        spec = self._current_spec()
        rooms = None if spec is None else rooms_for(x, given, [self.module.self_attn.layer_idx])
        if spec is None or rooms is None:
            return None
        [layer], rows, [(keys, values)] = rooms
        cos, sin = given["position_embeddings"]
        try:
            y = native.block(x, cos, sin, keys, values, spec, (rows, rows))
        except KernelError:  # a vector that was converted in place, say: torch has a result, or its error
            return None
        if y is not None:
            layer.advance(rows + x.shape[1])
        return y

    def _current_spec(self) -> BlockSpec | None:
        """Return what the layer is made of, or None if it has what the native call does not know."""
        known = self._known
        if known is None or not known[0].same():
            inside = [module for module in self.module.modules() if module is not self.module]
            code = originals(layer_roots, *dict.fromkeys(map(type, inside)))
            self._known = known = Members(inside, also=(self.module,), names=NUMBERS), code, spec_of(self.module)
        members, code, spec = known
        if spec is None or self.module.self_attn.config._attn_implementation != "sdpa":
            return None
        return spec if not members.watched() and code.intact() else None


def rooms_for(
    x: Tensor, given: dict[str, Any], indices: Sequence[int]
) -> tuple[list[Any], int, list[tuple[Tensor, Tensor]]] | None:
    """Return what layers of a cache, by their indices, have for the positions of x (B, T, C), which see all before.

    That is the layers, how many positions each holds, and their float16 keys and values with room for those of x. None
    if one of them has none of it, or if the mask says that a position does not see all before it.
    """
    cache, count = given.get(cache_name()), x.shape[1]
    if cache is None or not _own(cache):
        return None
    layers = growing(cache, indices)
    rooms: list[Any] = [None if layer is None else layer.reserve(count) for layer in layers]
    if None in rooms:
        return None
    rows: int = rooms[0][2]
    if any(keys.shape[0] != x.shape[0] or held != rows for keys, _, held in rooms):
        return None
    if not _causal(given.get("attention_mask"), count, rows):
        return None
    return layers, rows, [(keys, values) for keys, values, _ in rooms]


def _causal(mask: Tensor | None, count: int, rows: int) -> bool:
    """Whether each of ``count`` positions after ``rows`` ones sees all before it and itself.

    The layers of a model ask about the same mask one after the other.
    """
    if mask is None or count == 1:  # None over several: Transformers would count them from the first row
        return mask is None and count == 1
    if mask.is_inference():  # such a tensor does not count what is written into it
        return _is_causal(mask, count, rows)
    last, version, at, answer = _asked[0]
    if last() is not mask or version != mask._version or at != rows:
        answer = _is_causal(mask, count, rows)
        _asked[0] = weakref.ref(mask), mask._version, rows, answer
    return answer


def _is_causal(mask: Tensor, count: int, rows: int) -> bool:
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[-2:] != (count, rows + count):
        return False
    return bool(mask[..., :rows].all()) and bool((mask[..., rows:] == _triangle(count)).all())


def _triangle(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


_asked: list[tuple[Any, int, int, bool]] = [(lambda: None, 0, 0, False)]  # replaced whole: threads share it


def layer_roots(*kinds: type) -> list[Root]:
    """Return what a layer of modules of these kinds runs, as the native call leaves it out."""
    return [*calls(*kinds), *attention_roots(*kinds)]


def _own(cache: Any) -> bool:
    """Whether ``cache`` takes keys and values as Transformers' own caches do."""
    kind: type = type(cache)
    return "update" not in cache.__dict__ and originals(_cache_roots, kind).intact()


def _cache_roots(cache: type) -> list[Root]:
    from transformers import cache_utils

    return [(cache, "update"), (cache_utils.Cache, "update"), (cache_utils.DynamicLayer, "update")]


def spec_of(layer: Any) -> BlockSpec | None:
    """Return what ``layer`` is made of, or None if it has what the native call does not know."""
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

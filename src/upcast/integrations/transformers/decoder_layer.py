"""One native call per decoder layer: Transformers' layers of the Llama kind over a float16 cache that holds something.

A token, drafted tokens to be verified, a further chunk of a prompt, of rows that may be padded on the left. Where the
MLP is another than Llama's, of experts say, the call goes as far as attention, and what follows runs as modules. The
first chunk, a layer that someone watches, and all that trains or traces run the forwards of `modules`, one by one,
which give the same.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from upcast.kernels.block_spec import ACTIVATIONS, PARTS, BlockSpec, Norm
from upcast.tensor import autocast
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT
from upcast.tensor.genuine import Originals, Root, calls, originals

WHOLE, ATTENTION = PARTS["whole"], PARTS["attention"]
NUMBERS = ("variance_epsilon", "scaling", "head_dim", "num_key_value_groups", "layer_idx")
# Whether gradients, autocast or a transformation want to see what is done; the profiler does without.
_QUESTIONS = [torch.is_grad_enabled, autocast.enabled, *transforms.questions()]
_OWNERS, _TOLD, _KEPT = map(list, zip(*transforms.flags(profiled=False), strict=True))


running = threading.local()  # .run: what this thread's forward of a model knows of its layers; see `layer_stack`


class FusedDecoderLayer(TransformersForward):
    """LlamaDecoderLayer for new positions after those of a cache, under SDPA, which see all before them but padding."""

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
        if native.prefers_torch(x.shape[0] * x.shape[1]):
            return False
        return x.is_cpu and x.is_contiguous() and not self.module.training and kernels.active() is native

    def _in_one_call(self, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Return the layer's output, or None where the native call does not cover it; nothing has changed then."""
        spec = self._current_spec()
        if spec is None or not turns(given["position_embeddings"], x, spec.head_width):
            return None
        room = rooms_for(x, given, [self.module.self_attn.layer_idx])
        if room is None:
            return None
        [layer], rows, [(keys, values)], first = room
        cos, sin = given["position_embeddings"]
        part = WHOLE if has_mlp(spec) else ATTENTION
        try:
            y = native.block(x, cos, sin, keys, values, spec, (rows, rows), part, first=first)
        except KernelError:  # a vector that was converted in place, say: torch has a result, or its error
            return None
        if y is None:
            return None
        layer.advance(rows + x.shape[1])
        return y if part == WHOLE else self._after_attention(y.add_(x))

    def _after_attention(self, x: Tensor) -> Any:
        """Return the layer's output where its MLP, experts say, is for itself to run."""
        return x + self.module.mlp(self.module.post_attention_layernorm(x))

    def _current_spec(self) -> BlockSpec | None:
        """Return what the layer is made of, or None if it has what the native call does not know."""
        known = self._known
        if known is None or not known[0].same():
            inside = stood_for(self.module)
            code = originals(layer_roots, *dict.fromkeys(map(type, inside)))
            self._known = known = Members(inside, also=(self.module,), names=NUMBERS), code, spec_of(self.module)
        members, code, spec = known
        if spec is None or self.module.self_attn.config._attn_implementation != "sdpa":
            return None
        return spec if not members.watched() and code.intact() else None


class Room(NamedTuple):
    """What layers of a cache have for new positions."""

    layers: list[Any]
    rows: int  # that each of them holds
    buffers: list[tuple[Tensor, Tensor]]  # float16 keys and values with room for more
    first: Tensor | None  # (B,) the first position that each row of the batch sees; None: all of them all


def rooms_for(x: Tensor, given: dict[str, Any], indices: Sequence[int]) -> Room | None:
    """Return what layers of a cache, by their indices, have for the positions of x (B, T, C).

    None if one of them holds nothing yet or is not ours, or if a position does not see all before it but padding.
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
    seen = _seen(given.get("attention_mask"), x.shape[0], count, rows)
    return None if seen is None else Room(layers, rows, [(keys, values) for keys, values, _ in rooms], *seen)


Seen = tuple[Tensor | None] | None  # the first position that each row of the batch sees; None: something else is masked


def _seen(mask: Tensor | None, batch: int, count: int, rows: int) -> Seen:
    """Return which of ``rows`` positions before them ``count`` ones see first, if each sees all from there to itself.

    The layers of a model ask about the same mask one after the other.
    """
    if mask is None:  # over several: Transformers would count them from the first row
        return (None,) if count == 1 else None
    if mask.is_inference():  # such a tensor does not count what is written into it
        return _look(mask, batch, count, rows)
    last, version, at, answer = _asked[0]
    if last() is not mask or version != mask._version or at != (batch, rows):
        answer = _look(mask, batch, count, rows)
        _asked[0] = weakref.ref(mask), mask._version, (batch, rows), answer
    return answer


def _look(mask: Tensor, batch: int, count: int, rows: int) -> Seen:
    if mask.dtype is not torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, count, rows + count):
        return None
    first = rows + count - mask[:, 0, -1].sum(-1)  # what a row's last query does not see comes before all that it sees
    positions = torch.arange(rows + count)
    sees = (positions >= first[:, None, None]) & (positions <= torch.arange(rows, rows + count)[:, None])
    if mask.shape[0] not in (1, batch) or bool((first > rows).any()) or not torch.equal(mask[:, 0], sees):
        return None
    return (first.expand(batch).contiguous() if bool(first.any()) else None,)


_asked: list[tuple[Any, int, tuple[int, int], Seen]] = [(lambda: None, 0, (0, 0), None)]  # replaced whole, for threads


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


def has_mlp(spec: BlockSpec) -> bool:
    """Whether the native call knows the MLP as well."""
    return spec.gate.weight is not None


def _gated(layer: Any) -> FusedGatedMLP | None:
    """Return the fused forward of a layer's MLP; None of another, which runs as a module."""
    mlp = layer.mlp
    gated = mlp.__dict__.get("forward")
    return gated if fuses(mlp, FusedGatedMLP) and activation(mlp) == gated.activation else None


def stood_for(layer: Any) -> list[nn.Module]:
    """Return the modules inside ``layer`` that the native call stands for."""
    apart = {id(module) for module in layer.mlp.modules()} if _gated(layer) is None else set()
    return [module for module in layer.modules() if module is not layer and id(module) not in apart]


def spec_of(layer: Any) -> BlockSpec | None:
    """Return what ``layer`` is made of, or None if it has what the native call does not know."""
    attn, mlp, gated = layer.self_attn, layer.mlp, _gated(layer)
    if not fuses(attn, FusedAttention):
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
            activation=ACTIVATIONS[gated.activation if gated else "silu"],
            scale=attn.scaling,
            softcap=0.0,
            window=0,
            qkv=query,
            key=key,
            value=matrix(attn.v_proj),
            proj=matrix(attn.o_proj),
            gate=matrix(mlp.gate_proj if gated else None),
            up=matrix(mlp.up_proj if gated else None),
            down=matrix(mlp.down_proj if gated else None),
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

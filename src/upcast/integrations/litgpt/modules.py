"""Fused forwards for LitGPT's own modules: norms, MLPs, causal attention and its cache."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core import messages, torch_private
from upcast.core.forward_override import push
from upcast.integrations.fused import Fused, GatedMLP, float32, hooked
from upcast.integrations.litgpt.positions import CachePosition, first_of_run, is_causal, positions
from upcast.integrations.litgpt.prefix_cache import CacheReset
from upcast.integrations.litgpt.versions import given, of_module, setting
from upcast.kernels import reference
from upcast.policy import mode
from upcast.tensor import autocast
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT, WHY_FLOAT32
from upcast.tensor.genuine import Root, calls, forwards

SCORES = "scaled_dot_product_attention"


class LitGPTForward(Fused):
    """A fused forward, or another method, of one of LitGPT's modules."""

    owner = "litgpt"


# --- norms ------------------------------------------------------------------------------------------------------------


class FusedRMSNorm(LitGPTForward):
    """LitGPT's RMSNorm over the last dimension."""

    def fused(self, x: Tensor) -> Any:
        norm = self.module
        if not self.fits(x) or not float32(norm.weight):
            return self.unfused(x)
        self.calls += 1
        return kernels.rms_norm(x, norm.weight, norm.eps, norm.add_unit_offset)


class FusedLayerNorm(LitGPTForward):
    """torch's LayerNorm over the last dimension, with or without weight and bias."""

    def fused(self, input: Tensor) -> Any:
        norm = self.module
        if not self.free(input) or not all(each is None or float32(each) for each in (norm.weight, norm.bias)):
            return self.unfused(input)
        self.calls += 1
        return kernels.active().layer_norm(input, norm.weight, norm.bias, norm.eps)


# --- MLPs -------------------------------------------------------------------------------------------------------------


class FusedGatedMLP(LitGPTForward, GatedMLP):
    """LLaMAMLP and GemmaMLP."""

    layers = ("fc_1", "fc_2", "proj")


# --- the cache --------------------------------------------------------------------------------------------------------


class CacheBuilder(LitGPTForward):
    """``build_kv_cache`` of one attention: caches of ``dtype`` (None: torch's default) unless the caller names one."""

    method = "build_kv_cache"

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, stays: bool = True) -> None:
        super().__init__(module)
        self.dtype = dtype
        self.stays = stays  # False: under a policy other than safe, the cache's own forward runs

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """The caches that are made count as well."""
        return _cache_roots, type(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fused(*args, **kwargs) if self.genuine() or not self.stays else self.unfused(*args, **kwargs)

    def fused(
        self,
        batch_size: int,
        max_seq_length: int,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Return a KVCache as LitGPT does; one in float16 keeps its dtype until keys or values do not fit."""
        attn = self.module
        cache = type(attn).build_kv_cache(
            attn, batch_size, max_seq_length, rope_cache_length, device, self.dtype if dtype is None else dtype
        )
        if not self.stays:
            mode.mark_buffers(cache)
        else:
            push(cache, FusedCache(cache, self))
            cache.__dict__["reset_parameters"] = CacheReset(cache)
        return cache

    def upcast(self, cache: Any) -> None:
        """Turn ``cache`` to float32, and have all later ones of this layer made so."""
        cache.k, cache.v = cache.k.float(), cache.v.float()
        self.dtype = torch.float32
        messages.say(f"the KV cache of layer {of_module(self.module, 'block_idx')} goes to float32: {WHY_FLOAT32}")


class FusedCache(LitGPTForward):
    """A KVCache of which a float16 one stays that: LitGPT's own forward would recast it to what comes in."""

    def __init__(self, module: nn.Module, builder: CacheBuilder) -> None:
        super().__init__(module)
        self.builder = builder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.module
        if torch.compiler.is_compiling():  # then the model itself has forgotten
            return self.fused(*args, **kwargs)
        if self.genuine():
            return self.fused(*args, **kwargs)
        cache.k, cache.v = cache.k.float(), cache.v.float()  # as whoever replaced something expects them
        return self.unfused(*args, **kwargs)

    def fused(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, Hkv, T, D) and return the whole cache, both in their dtype."""
        cache = self.module
        if cache.k.dtype == torch.float16 and k.dtype == torch.float32 and not autocast.enabled():
            keys, values = k.half(), v.half()
            if not _refused(k, keys, KEY_LIMIT) and not _refused(v, values, VALUE_LIMIT):
                all_keys, all_values = self.unfused(input_pos, keys, values)
                return all_keys.float(), all_values.float()
            self.builder.upcast(cache)
        full: tuple[Tensor, Tensor] = self.unfused(input_pos, k, v)
        return full


def _cache_roots(attention: type) -> list[Root]:
    """What decides which cache an attention gets, and what that one does."""
    from litgpt import model

    return [(attention, "build_kv_cache"), *_attention_roots(attention), (model, "KVCache")]


def _attention_roots(attention: type) -> list[Root]:
    from litgpt.model import KVCache

    return [*forwards(attention), *calls(KVCache)]


def _refused(wide: Tensor, half: Tensor, limit: float) -> bool:
    return bool((half.isinf() & wide.isfinite()).any()) or reference.beyond(wide, limit)


# --- attention --------------------------------------------------------------------------------------------------------


class FusedAttention(LitGPTForward):
    """CausalSelfAttention for consecutive positions, with LitGPT's KVCache in float16 or float32, or without."""

    layer = "qkv"  # what it calls the layer of q, k and v
    angle_dims = 3  # of cos and sin: (1, T, n)

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """The cache is not called."""
        return _attention_roots, type(module)

    def genuine(self) -> bool:
        """Whether it, its cache's code and its method for the scores are LitGPT's own."""
        return super().genuine() and SCORES not in self.module.__dict__

    def fused(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
    ) -> Any:
        place = self._usual(x, (cos, sin), mask, input_pos, input_pos_maxp1) if self.fits(x) else None
        if place is None:
            return self.unfused(x, cos, sin, *given(mask, input_pos, input_pos_maxp1))
        qkv = getattr(self.module, self.layer)(x)
        if not self.fits(qkv):
            return self.unfused(x, cos, sin, *given(mask, input_pos, input_pos_maxp1))
        self.calls += 1
        q, k, v = self._heads(qkv, cos, sin)
        y = self._attend(q, k, v, place)
        return self.module.proj(y.transpose(1, 2).flatten(2))

    def _usual(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, input_pos: Tensor | None, maxp1: int | None
    ) -> CachePosition | None:
        """Return where the positions stand if the arguments are what the kernels cover."""
        cos = angles[0]
        if x.dim() != 3 or cos.dim() != self.angle_dims or not x.numel():
            return None
        if cos.shape[-1] != self.module.config.rope_n_elem:
            return None
        if any(each.dtype is not torch.float32 for each in angles):
            return None
        if input_pos is None:
            return CachePosition(0) if mask is None and (self.free(x) or self._plain()) else None
        if not self.free(x):  # a gradient through a cache
            return None
        start = first_of_run(input_pos, x.shape[1])
        if start is None or mask is None or not is_causal(mask, start, x.shape[1]):
            return None
        return self.place(start, x.shape[0], x.shape[1], maxp1)

    def _plain(self) -> bool:
        """Whether every query sees all that is before it, and scores go into softmax as they are."""
        config = self.module.config
        return not self.module.apply_sliding_window_attention and config.attention_logit_softcapping is None

    def place(self, start: int, batch: int, time: int, maxp1: int | None) -> CachePosition | None:
        """Return where ``time`` positions from ``start`` on go in the cache; None if that is for LitGPT to say."""
        attn = self.module
        cache = attn.kv_cache
        if (
            not plain_cache(cache, self.cache_heads(), attn.config.head_size)
            or hooked(cache)
            or cache.k.shape[0] < batch
        ):
            return None
        if torch_private.any_global_hook():
            return None
        capped = attn.config.attention_logit_softcapping is not None
        where = positions(cache.k.shape[2], attn.apply_sliding_window_attention, capped, start, time, maxp1)
        return None if where is None else CachePosition(*where, cache)

    def cache_heads(self) -> int:
        """Return how many heads a cache has."""
        return int(self.module.config.n_query_groups)

    def scale(self) -> float:
        """Return the factor of the scores."""
        attn = self.module
        return float(
            of_module(attn, "mscale") ** 2 / math.sqrt(attn.config.attention_scores_scalar or attn.config.head_size)
        )

    def _heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split qkv (B, T, C) into heads (B, H, T, D), normalised and turned as the config says."""
        attn, config = self.module, self.module.config
        shape = (*qkv.shape[:2], -1, config.head_size)
        groups = config.n_query_groups * config.head_size
        q, k, v = qkv.split((config.n_head * config.head_size, groups, groups), dim=-1)
        norms = setting(config, "norm_qk") and setting(config, "norm_qk_type")
        if norms == "olmo2":
            q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (each.view(shape).transpose(1, 2) for each in (q, k, v))
        if norms == "default":
            q, k = attn.norm_q(q), attn.norm_k(k)
        cos, sin = cos.contiguous(), sin.contiguous()  # of dual rope caches, a slice with gaps
        return self._turned(q, cos, sin), self._turned(k, cos, sin), v

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        width = cos.shape[-1]
        if setting(
            self.module.config, "rope_interleave"
        ):  # LitGPT sorts even elements before odd ones, and leaves them there
            pairs = x[..., :width].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            x = torch.cat((pairs, x[..., width:]), dim=-1)
        return kernels.rope(x, cos, sin)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, place: CachePosition) -> Any:
        attn, cache = self.module, place.cache
        if cache is None and kernels.wants_gradient(q, k, v):
            return kernels.causal_attention(q, k, v, self.scale())
        window = attn.config.sliding_window_size if attn.apply_sliding_window_attention else None
        if cache is not None:
            batch = q.shape[0]
            if not self._appended(cache, batch, k, v, place.write):
                attn.build_kv_cache.upcast(cache)
                self._appended(cache, batch, k, v, place.write)
            k, v = cache.k[:batch], cache.v[:batch]
        return kernels.active().attention(
            q,
            k,
            v,
            start=place.start,
            scale=self.scale(),
            window=window,
            softcap=attn.config.attention_logit_softcapping,
        )

    @staticmethod
    def _appended(cache: Any, batch: int, k: Tensor, v: Tensor, at: int) -> bool:
        """Write k and v; False if they do not fit, and are to be written again."""
        append = kernels.active().kv_append
        return bool(append(cache.k[:batch], k, at, KEY_LIMIT) and append(cache.v[:batch], v, at, VALUE_LIMIT))


def plain_cache(cache: Any, heads: int, width: int) -> bool:
    """Whether ``cache`` is LitGPT's own, of so many heads of that width, and of a dtype that the kernels take."""
    from litgpt.model import KVCache

    if type(cache) is not KVCache or not isinstance(cache.__dict__.get("forward"), (FusedCache, type(None))):
        return False
    k, v = cache.k, cache.v
    fits = all((t.shape[1], t.shape[3]) == (heads, width) and t.is_cpu for t in (k, v)) and k.shape[:3] == v.shape[:3]
    return fits and k.dtype == v.dtype and k.dtype in (torch.float16, torch.float32)

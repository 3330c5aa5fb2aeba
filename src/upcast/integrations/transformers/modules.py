"""Fused forwards of single modules of Transformers: norms, gated MLPs and attention of the Llama kind."""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcast import kernels
from upcast.integrations.fused import Fused, GatedMLP, float32, unwatched_call
from upcast.integrations.transformers.versions import cache_name, cache_settings, extra
from upcast.tensor.attention_ops import over_cache, rows_in_use
from upcast.tensor.genuine import Root, Table, calls, forwards
from upcast.tensor.half_weight import HalfWeight


def wide(angles: Any) -> bool:
    """Whether cos and sin are float32: they are of the dtype of the embeddings that the model was given."""
    return angles is not None and angles[0].dtype is angles[1].dtype is torch.float32


class TransformersForward(Fused):
    """A fused forward of one of Transformers' modules."""

    owner = "transformers"


class FusedRMSNorm(TransformersForward):
    """RMSNorm over the last dimension, with a plain weight."""

    def fused(self, hidden_states: Tensor) -> Any:
        norm = self.module
        if not self.fits(hidden_states) or not float32(norm.weight):
            return self.unfused(hidden_states)
        self.calls += 1
        return kernels.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


class FusedGatedMLP(TransformersForward, GatedMLP):
    """LlamaMLP, and those like it."""

    layers = ("gate_proj", "up_proj", "down_proj")

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """The activation is not called."""
        return _gated_roots, type(module), type(module.act_fn)

    def genuine(self) -> bool:
        """Whether it and its activation are what they were, and nobody watches the activation."""
        return super().genuine() and activation(self.module) == self.activation


class FusedAttention(TransformersForward):
    """Llama's or Qwen3's attention under SDPA: rope in one kernel, and a float16 cache read as it is."""

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """Transformers' function for SDPA is not called."""
        return attention_roots, type(module)

    def fused(
        self,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        attn = self.module
        angles: Any = kwargs.get("position_embeddings")
        drops = attn.training and attn.attention_dropout > 0
        usual = not args and attn.config._attn_implementation == "sdpa" and not drops
        if not usual or not self.fits(hidden_states) or not wide(angles):
            return self.unfused(hidden_states, *args, **kwargs)
        if not turns(angles, hidden_states, attn.head_dim) or extra(kwargs):
            return self.unfused(hidden_states, *args, **kwargs)
        shape = (*hidden_states.shape[:-1], -1, attn.head_dim)
        q, k, v = (layer(hidden_states) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        if not all(map(self.fits, (q, k, v))):
            return self.unfused(hidden_states, **kwargs)
        self.calls += 1
        q, k, v = (each.view(shape) for each in (q, k, v))
        if "q_norm" in attn._modules:
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        cos, sin = (each.contiguous() for each in angles)
        q, k = kernels.rope(q, cos, sin), kernels.rope(k, cos, sin)
        cache = kwargs.get(cache_name())
        if cache is not None:
            k, v = cache.update(k, v, attn.layer_idx, *cache_settings(cos, sin, kwargs))
        y = self._attend(q, k, v, kwargs.get("attention_mask"), kwargs.get("is_causal"))
        return attn.o_proj(y.transpose(1, 2).reshape(*shape[:-2], -1)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None) -> Any:
        """Return (B, H, T, D); what Transformers' own SDPA forward says, for the module's groups of heads."""
        attn, time = self.module, q.shape[2]
        masked = mask is None and time > 1 and (causal if causal is not None else attn.is_causal)
        if isinstance(k, HalfWeight) and isinstance(v, HalfWeight):
            rows = rows_in_use(mask, q, k)
            if rows is not None and not (masked and time != rows):
                stored = k.stored[:, :, :rows], v.stored[:, :, :rows]
                return over_cache(q, *stored, attn.scaling, causal=bool(masked))
            k, v = k.upcast(), v.upcast()
        if masked and time == k.shape[2] and kernels.wants_gradient(q, k, v):
            return kernels.causal_attention(q, k, v, attn.scaling)
        options = {"is_causal": bool(masked), "scale": attn.scaling, "enable_gqa": attn.num_key_value_groups > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


def turns(angles: Any, x: Tensor, width: int) -> bool:
    """Whether ``angles``, cos and sin, are one row of ``width`` for each position of x (B, T, C)."""
    if type(angles) is not tuple or len(angles) != 2:
        return False
    cos, sin = angles
    shape = cos.shape
    return len(shape) == 3 and shape == sin.shape and shape[1:] == (x.shape[1], width) and shape[0] in (1, x.shape[0])


@functools.cache
def _activations() -> dict[type, str]:
    from transformers import activations

    known = {"SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}
    ours = {getattr(activations, name): kind for name, kind in known.items() if hasattr(activations, name)}
    return {**ours, nn.SiLU: "silu"}


def activation(mlp: Any) -> str | None:
    """Return what the kernels call the activation of a gated MLP; None for one they do not know, or that is watched."""
    act = mlp._modules.get("act_fn")
    name = _activations().get(type(act))
    return name if name and unwatched_call(act) and _plain_gelu(act) else None


def _plain_gelu(act: Any) -> bool:
    """Whether a GELU of Transformers has the function that it was made with, if it has one."""
    function = act.__dict__.get("act")
    if type(function) is functools.partial:
        return function.func is F.gelu and function.keywords == {"approximate": "tanh"}
    return function is None or function is F.gelu or getattr(function, "__self__", None) is act


def _gated_roots(mlp: type, act: type) -> list[Root]:
    return [*forwards(mlp), *calls(act)]


def attention_roots(*kinds: type) -> list[Root]:
    """Return the forwards of ``kinds``, and what an attention among them finds in Transformers' table for SDPA."""
    from transformers.integrations import sdpa_attention

    roots: list[Root] = [*forwards(*kinds), (sdpa_attention, "sdpa_attention_forward")]
    for kind in kinds:
        table = vars(sys.modules[kind.__module__]).get("ALL_ATTENTION_FUNCTIONS")
        for each in (getattr(table, "_local_mapping", table), getattr(table, "_global_mapping", None)):
            roots += [(Table(each, "transformers"), "sdpa")] if isinstance(each, dict) else []
    return roots

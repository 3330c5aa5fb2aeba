"""Fused forwards for Transformers: norms, gated MLPs and attention of the Llama kind, and float16 KV caches.

Many families carry copies of Llama's modules under their own names. What counts as such a copy is decided by the code
of its forward, compared with that of Llama's in the installed version, so that a family whose module does anything else
keeps its own. Llama's own forward is checked in the same way against a model of ours by tests/test_transformers.py.
"""

import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcast import kernels
from upcast.attention import over_cache, rows_in_use
from upcast.half_weight import HalfWeight
from upcast.integrations import litgpt_modules
from upcast.integrations.litgpt_modules import Fused
from upcast.integrations.transformers_cache import narrow

_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


class FusedRMSNorm(Fused):
    """RMSNorm over the last dimension, with a plain weight."""

    def __call__(self, hidden_states: Tensor) -> Any:
        norm = self.module
        if not self.fits(hidden_states):
            return self.unfused(hidden_states)
        self.calls += 1
        return kernels.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


class FusedGatedMLP(litgpt_modules.FusedGatedMLP):
    """down(activation(gate(x)) * up(x)), the activation and its product in one kernel."""

    layers = ("gate_proj", "up_proj", "down_proj")


class FusedAttention(Fused):
    """Llama's attention under SDPA: rope in one kernel, and a float16 cache read as it is."""

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        attn = self.module
        given = (position_embeddings, attention_mask, past_key_values, cache_position)
        drops = attn.training and attn.attention_dropout > 0
        if attn.config._attn_implementation != "sdpa" or drops or not self.fits(hidden_states):
            return self._own(hidden_states, given, kwargs)
        shape = (*hidden_states.shape[:-1], -1, attn.head_dim)
        q, k, v = (layer(hidden_states) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        if not all(map(self.fits, (q, k, v))):
            return self._own(hidden_states, given, kwargs)
        self.calls += 1
        q, k, v = (each.view(shape).transpose(1, 2) for each in (q, k, v))
        cos, sin = (each.contiguous() for each in position_embeddings)
        q, k = kernels.rope(q, cos, sin), kernels.rope(k, cos, sin)
        if past_key_values is not None:
            settings = {"sin": sin, "cos": cos, "cache_position": cache_position}
            k, v = past_key_values.update(k, v, attn.layer_idx, settings)
        y = self._attend(q, k, v, attention_mask, kwargs.get("is_causal"))
        return attn.o_proj(y.transpose(1, 2).reshape(*shape[:-2], -1)), None

    def _own(self, hidden_states: Tensor, given: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeddings, mask, cache, position = given
        return self.unfused(
            hidden_states,
            position_embeddings=embeddings,
            attention_mask=mask,
            past_key_values=cache,
            cache_position=position,
            **kwargs,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None) -> Any:
        """Return (B, H, T, D); what Transformers' own SDPA forward says, for the module's groups of heads."""
        attn, time = self.module, q.shape[2]
        masked = mask is None and time > 1 and (causal if causal is not None else attn.is_causal)
        if isinstance(k, HalfWeight) and isinstance(v, HalfWeight):
            rows = rows_in_use(mask, q, k)
            if rows is not None and not (masked and time != rows):
                stored = k.stored[:, :, :rows], v.stored[:, :, :rows]
                return over_cache(q, *stored, attn.scaling, causal=bool(masked))
            k, v = k.widened(), v.widened()
        if masked and time == k.shape[2] and kernels.wants_gradient(q, k, v):
            return kernels.causal_attention(q, k, v, attn.scaling)
        options = {"is_causal": bool(masked), "scale": attn.scaling, "enable_gqa": attn.num_key_value_groups > 1}
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


# --- which module gets which ------------------------------------------------------------------------------------------


def install(root: nn.Module, kv_cache: str) -> None:
    """Give the Transformers models in ``root`` their fused forwards and, if asked for, float16 caches."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:  # then no module of ``root`` can be of Transformers
        return
    for model in [module for module in root.modules() if isinstance(module, library.PreTrainedModel)]:
        for module in model.modules():
            if "forward" not in module.__dict__:
                _fuse(module)
        if kv_cache == "float16" and not any(hook is _narrow for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(_narrow, with_kwargs=True)


def remove(root: nn.Module) -> None:
    """Take away what `install` gave."""
    kinds = (FusedRMSNorm, FusedGatedMLP, FusedAttention)
    for module in root.modules():
        if isinstance(module.__dict__.get("forward"), kinds):
            del module.__dict__["forward"]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _narrow]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _narrow(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        narrow(cache)


def _fuse(module: Any) -> None:
    if not type(module).__module__.startswith("transformers.models."):
        return
    kinds = _patterns()
    code = _code(type(module).forward)
    if code == kinds["norm"] and _vector(module, "weight") and hasattr(module, "variance_epsilon"):
        module.__dict__["forward"] = FusedRMSNorm(module)
    elif code == kinds["mlp"] and (activation := _ACTIVATIONS.get(type(module.act_fn).__name__)):
        module.__dict__["forward"] = FusedGatedMLP(module, activation)
    elif code == kinds["attention"] and _rope(module) == kinds["rope"]:
        module.__dict__["forward"] = FusedAttention(module)


@functools.cache
def _patterns() -> dict[str, Any]:
    from transformers.models.llama import modeling_llama as llama

    return {
        "norm": _code(llama.LlamaRMSNorm.forward),
        "mlp": _code(llama.LlamaMLP.forward),
        "attention": _code(llama.LlamaAttention.forward),
        "rope": (_code(llama.apply_rotary_pos_emb), _code(llama.rotate_half)),
    }


def _rope(module: Any) -> Any:
    home = sys.modules[type(module).__module__]
    parts = (getattr(home, "apply_rotary_pos_emb", None), getattr(home, "rotate_half", None))
    return tuple(None if part is None else _code(part) for part in parts)


def _code(function: Callable[..., Any]) -> Any:
    """Return what a function does, without its name and its docstring."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code: CodeType = function.__code__
    constants = tuple(value for value in code.co_consts if value != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, constants


def _vector(module: nn.Module, name: str) -> bool:
    weight = module._parameters.get(name)
    return weight is not None and weight.dim() == 1 and weight.dtype == torch.float32

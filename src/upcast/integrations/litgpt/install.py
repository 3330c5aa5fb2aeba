"""Which of a LitGPT model's modules get a fused forward, and how they get it and lose it again."""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from upcast.core.errors import UpcastError
from upcast.core.extensions import Extension, register
from upcast.core.forward_override import in_effect, push
from upcast.core.module_tree import modules, named_modules
from upcast.integrations.litgpt import generation
from upcast.integrations.litgpt.causal_mask import CacheSetter, restore
from upcast.integrations.litgpt.gpt import FusedGPT
from upcast.integrations.litgpt.grouped_attention import FusedGroupedAttention
from upcast.integrations.litgpt.lora import FusedLoRAQKV
from upcast.integrations.litgpt.modules import (
    CacheBuilder,
    FusedAttention,
    FusedGatedMLP,
    FusedLayerNorm,
    FusedRMSNorm,
    LitGPTForward,
)
from upcast.integrations.litgpt.moe import FusedMoE
from upcast.integrations.litgpt.prefix_cache import CacheClearer
from upcast.integrations.litgpt.versions import GROUPED, PADDED, WINDOWED, grouped, lora_by_heads, why_unfused

KV_CACHES = {"float16": torch.float16, "float32": None}  # None: as LitGPT makes them

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


class LitGPTModels(Extension):
    """The models of LitGPT."""

    name = "litgpt"

    def unwrap(self, model: object) -> object:
        """An LLM without a model is refused; one with a model is a module."""
        if _is_llm(model) and getattr(model, "model", model) is None:
            raise UpcastError(
                "a litgpt LLM without a model; it was loaded with distribute=None. Call llm.distribute() first."
            )
        return model

    def only_generates(self, root: nn.Module) -> bool:
        """An LLM says that it is in training mode, by default."""
        return _is_llm(root)

    def install(self, root: nn.Module, kv_cache: str) -> None:
        """Give the modules of every GPT in ``root`` their fused forwards."""
        litgpt = sys.modules.get("litgpt.model")
        if litgpt is None or why_unfused(litgpt):  # then no module of ``root`` can be LitGPT's, or as we know it
            return
        for gpt in [module for module in modules(root) if isinstance(module, litgpt.GPT)]:
            for module in modules(gpt):
                if "forward" not in module.__dict__:
                    _fuse(module, litgpt, KV_CACHES[kv_cache])
            gpt.__dict__.setdefault("set_kv_cache", CacheSetter(gpt))
            gpt.__dict__.setdefault("clear_kv_cache", CacheClearer(gpt))
            generation.enter(gpt)

    def install_caches(self, root: nn.Module, kv_cache: str) -> None:
        """Have every GPT in ``root`` make caches of that dtype, and run otherwise as LitGPT has it."""
        litgpt = sys.modules.get("litgpt.model")
        if litgpt is None:
            return
        for module in modules(root):
            if isinstance(module, (litgpt.CausalSelfAttention, _latent_attention(litgpt))):
                dtype = KV_CACHES[kv_cache] or torch.float32
                module.__dict__["build_kv_cache"] = CacheBuilder(module, dtype, stays=False)

    def remove(self, root: nn.Module) -> None:
        """Let go of what generation has kept, and make the mask an ordinary one."""
        for module in modules(root):
            if isinstance(in_effect(module), FusedGPT):
                generation.leave(module)
                restore(module)

    def remarks(self, root: nn.Module) -> list[str]:
        """Return a line per reason for which modules of the GPTs in ``root`` keep LitGPT's own forward."""
        litgpt = sys.modules.get("litgpt.model")
        if litgpt is None:
            return []
        why = why_unfused(litgpt)
        if why:
            found = hasattr(litgpt, "GPT") and any(isinstance(module, litgpt.GPT) for module in modules(root))
            return [f"not fused: LitGPT's modules ({why})"] if found else []
        reasons: dict[str, list[str]] = {}
        for prefix, gpt in named_modules(root):
            if isinstance(gpt, litgpt.GPT):
                for name, reason in unfused(gpt).items():
                    reasons.setdefault(reason, []).append(f"{prefix}.{name}" if prefix else name)
        return [f"not fused: {_listed(names)} ({reason})" for reason, names in reasons.items()]

    def doors(self, root: nn.Module) -> Iterator[nn.Module]:
        """LitGPT's generation calls the GPT, in whatever it is wrapped."""
        return (module for module in modules(root) if hasattr(type(module), "set_kv_cache"))


def _is_llm(model: object) -> bool:
    return type(model).__name__ == "LLM" and type(model).__module__.startswith("litgpt.")


def unfused(gpt: nn.Module) -> dict[str, str]:
    """Return name -> reason for the modules of a LitGPT model that always keep LitGPT's own forward."""
    litgpt = sys.modules["litgpt.model"]
    reasons = {name: _reason(module, litgpt) for name, module in named_modules(gpt)}
    return {name: reason for name, reason in reasons.items() if reason}


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _fuse(module: nn.Module, litgpt: Any, cache: torch.dtype | None) -> None:
    """Give one module its fused forward, if there is one for what it is and for what its config needs."""
    make = None if _reason(module, litgpt) else _table(litgpt).get(_kind(module, litgpt))
    if make is not None:
        push(module, make(module))
    if isinstance(module.__dict__.get("forward"), FusedAttention):
        module.__dict__["build_kv_cache"] = CacheBuilder(module, cache)


def _table(litgpt: Any) -> dict[type, Callable[[Any], LitGPTForward]]:
    """Return type -> fused forward, for modules of which `_kind` says that they are of that type."""
    lora = sys.modules.get("litgpt.lora")
    return {
        **({lora.LoRAQKVLinear: FusedLoRAQKV} if lora else {}),
        litgpt.RMSNorm: FusedRMSNorm,
        nn.LayerNorm: FusedLayerNorm,
        litgpt.LLaMAMLP: lambda mlp: FusedGatedMLP(mlp, "silu"),
        litgpt.GemmaMLP: lambda mlp: FusedGatedMLP(mlp, _GELU[mlp.config.gelu_approximate]),
        litgpt.LLaMAMoE: FusedMoE,
        litgpt.CausalSelfAttention: lambda attn: (FusedGroupedAttention if grouped(attn) else FusedAttention)(attn),
        litgpt.GPT: FusedGPT,
    }


def _kind(module: nn.Module, litgpt: Any) -> type:
    """Return the module's type, or LitGPT's own of which it is a subclass that computes the same with other layers.

    Such are the MLPs and attentions of LoRA; an adapter's attention computes something else.
    """
    for kind, methods in (
        (litgpt.GemmaMLP, ["forward"]),
        (litgpt.LLaMAMLP, ["forward"]),
        (litgpt.CausalSelfAttention, ["forward", "scaled_dot_product_attention"]),
    ):
        if isinstance(module, kind) and all(getattr(type(module), name) is getattr(kind, name) for name in methods):
            return kind  # type: ignore[no-any-return]
    return type(module)


def _latent_attention(litgpt: Any) -> Any:
    """Return the class of latent attentions; no class in versions of LitGPT that have none."""
    return getattr(litgpt, "MultiheadLatentAttention", ())


def _reason(module: Any, litgpt: Any) -> str:
    """Return why ``module`` cannot be fused though its kind can, or an empty string."""
    if isinstance(module, _latent_attention(litgpt)):
        return "latent attention"
    if isinstance(module, litgpt.CausalSelfAttention):
        if _kind(module, litgpt) is not litgpt.CausalSelfAttention:
            return f"a {type(module).__module__} layer"
        if module.apply_sliding_window_attention and not _has_rings(litgpt):
            return WINDOWED
        return "rope of an odd number of elements" if module.config.rope_n_elem % 2 else ""
    if isinstance(module, litgpt.Block):
        return GROUPED if isinstance(module.attn, litgpt.CausalSelfAttention) and grouped(module.attn) else ""
    if type(module).__name__ == "LoRAQKVLinear" and not lora_by_heads(module):
        return PADDED
    if isinstance(module, litgpt.RMSNorm):
        return "" if module.dim == -1 else f"a norm over dimension {module.dim}"
    return ""


def _has_rings(litgpt: Any) -> bool:
    """Whether the cache of a sliding window holds no more than the window."""
    return "is_sliding_window" in inspect.signature(litgpt.KVCache).parameters


register(LitGPTModels())

"""What upcast uses of Transformers' insides, and which versions have it.

Whether a module is of the Llama kind is decided by its code (`transformers.install`); here is what differs between the
Llamas of the versions. What a version does not have costs the fused forwards of attention and layers, or all of them,
and the plan says so.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from upcast.core import torch_private
from upcast.integrations.versions import newer
from upcast.tensor.genuine import is_own

OLDEST, NEWEST = "4.51", "5.24"

# Module -> what the fused forwards and the caches ask it for; all versions from OLDEST on have them.
NAMES = {
    "transformers.models.llama.modeling_llama": (
        *("LlamaAttention", "LlamaDecoderLayer", "LlamaMLP", "LlamaModel", "LlamaRMSNorm"),
        *("apply_rotary_pos_emb", "rotate_half"),
    ),
    "transformers.models.mistral.modeling_mistral": ("MistralAttention", "MistralModel"),
    "transformers.models.qwen2.modeling_qwen2": ("Qwen2Attention", "Qwen2Model"),
    "transformers.models.qwen3.modeling_qwen3": ("Qwen3Attention", "Qwen3Model"),
    "transformers.integrations.sdpa_attention": ("sdpa_attention_forward",),
    "transformers.cache_utils": ("Cache",),
}
# What an attention calls its cache: before 4.56 something else, and its layers returned tuples; those run as they are.
CACHE_NAMES = {"past_key_values": "from 4.56 on", "cache": "5.24"}
# What an attention may be given for functions other than SDPA as upcast knows it.
UNKNOWN = ("position_bias", "softcap")


@functools.cache
def cache_name() -> str:
    """Return what the installed version's attention calls its cache; "" for one that upcast does not know."""
    return next((name for name in CACHE_NAMES if name in _attention_takes()), "")


@functools.cache
def takes_positions() -> bool:
    """Whether an attention hands its cache angles and positions, as before 5.8: caches count for themselves since."""
    return "cache_position" in _attention_takes()


@functools.cache
def _attention_takes() -> frozenset[str]:
    """Return the names of what an attention is called with: Llama's, or another's where the program replaced that."""
    kinds = [_get(module, name) for module, names in NAMES.items() for name in names if name.endswith("Attention")]
    own = [kind.forward for kind in kinds if kind and is_own(kind.forward, "forward", "transformers")]
    return frozenset(inspect.signature(own[0]).parameters) if own else frozenset()


@functools.cache
def narrows_caches() -> bool:
    """Whether the version's caches have layers, and these say whether they hold anything."""
    begin = getattr(_get("transformers.cache_utils", "DynamicLayer"), "lazy_initialization", None)
    return "is_initialized" in getattr(getattr(begin, "__code__", None), "co_names", ())


def cache_settings(cos: Tensor, sin: Tensor, given: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return what the version's attention hands to its cache beside keys, values and the layer's number."""
    return ({"sin": sin, "cos": cos, "cache_position": given.get("cache_position")},) if takes_positions() else ()


def extra(given: Mapping[str, Any]) -> bool:
    """Whether arguments ask for something that the fused attention does not do, or come under another name."""
    other = (name for name in CACHE_NAMES if name != cache_name())
    return any(given.get(name) is not None for name in (*UNKNOWN, *other))


@functools.cache
def why_unfused() -> str:
    """Return why nothing of this version is fused, or an empty string."""
    too_new = newer("transformers", NEWEST) or torch_private.why_unfused()
    if too_new:
        return too_new
    missing = [f"{module}.{name}" for module, names in NAMES.items() for name in names if _get(module, name) is None]
    return f"this version of Transformers has no {missing[0]}" if missing else ""


def why_in_part() -> str:
    """Return why attention, caches or whole layers are as they are, or an empty string."""
    if not cache_name():
        return "attention, caches and layers of Transformers before 4.56; its norms and MLPs are"
    return "" if narrows_caches() else "caches of Transformers before 4.57 stay float32, and layers run part by part"


def _get(module: str, name: str) -> Any:
    try:
        return getattr(__import__(module, fromlist=[name]), name, None)
    except ImportError:
        return None

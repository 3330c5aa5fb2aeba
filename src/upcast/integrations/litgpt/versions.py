"""What upcast uses of LitGPT's insides, and which versions have it.

A setting that a version lacks has, in that version, the one value that it could have: what came later was not there.
Whatever else is missing costs the fused forwards, and the plan says so.
"""

import dataclasses
from typing import Any, NamedTuple

from upcast.core import torch_private
from upcast.integrations.versions import installed, newer, numbers

OLDEST, NEWEST = "0.4.11", "0.5.13"


class Since(NamedTuple):
    """A name that came with ``version``; before it, everything was as with ``before``."""

    version: str
    before: Any


# Of litgpt.model.
CLASSES = (
    "GPT",
    "Block",
    "RMSNorm",
    "GptNeoxMLP",
    "LLaMAMLP",
    "GemmaMLP",
    "LLaMAMoE",
    "CausalSelfAttention",
    "KVCache",
)
# Of Config, in all versions from OLDEST on.
SETTINGS = (
    *("attention_logit_softcapping", "attention_scores_scalar", "final_logit_softcapping", "gelu_approximate"),
    *("head_size", "n_embd", "n_expert_per_token", "n_head", "n_query_groups", "parallel_residual"),
    *("scale_embeddings", "shared_attention_norm", "sliding_window_size"),
)
# Of Config, in later ones.
LATER = {
    "latent_attention": Since("0.5.11", None),
    "n_expert_groups": Since("0.5.12", None),
    "n_shared_expert": Since("0.5.12", None),
    "norm_qk": Since("0.5.5", False),
    "norm_qk_type": Since("0.5.9", "olmo2"),
    "rope_indices": Since("0.5.8", None),
    "rope_interleave": Since("0.5.13", False),
    "routed_scaling_factor": Since("0.5.12", 1.0),
}
# Of modules: `mscale` of an attention is 1 before YaRN; a cache was no ring, and its blocks had no number.
MODULE_LATER = {
    "mscale": Since("0.5.13", 1.0),
    "is_sliding_window": Since("0.5.12", False),
    "block_idx": Since("0.5.5", "?"),
}
GROUPED = "before LitGPT 0.5.5 q, k and v of a head lie side by side: its parts are fused one by one"
WINDOWED = "a sliding window before LitGPT 0.5.12, whose cache has none"
PADDED = "before LitGPT 0.5.13 LoRA places q, k and v of such heads elsewhere"


def setting(config: Any, name: str) -> Any:
    """Return a setting of a Config, or what it was before it had a name."""
    return getattr(config, name, LATER[name].before)


def of_module(module: Any, name: str) -> Any:
    """Return an attribute of one of LitGPT's modules, or what it was before it had a name."""
    return getattr(module, name, MODULE_LATER[name].before)


def given(*arguments: Any) -> tuple[Any, ...]:
    """Return positional arguments without the None at their end: older forwards take fewer."""
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    return arguments


def grouped(attention: Any) -> bool:
    """Whether an attention has q, k and v of a group of heads side by side, from one layer ``attn``."""
    return "qkv" not in attention._modules


def lora_by_heads(lora: Any) -> bool:
    """Whether a LoRAQKVLinear adds to all q, then to all k, then to all v, as many rows as their heads have."""
    have = installed("litgpt") or numbers(NEWEST)
    square = lora.linear.in_features == lora.n_head * lora.head_size
    return have >= numbers("0.5.13") or (have >= numbers("0.5.5") and square)


def why_unfused(litgpt: Any) -> str:
    """Return why nothing of this version is fused, or an empty string; ``litgpt`` is its module ``litgpt.model``."""
    too_new = newer("litgpt", NEWEST) or torch_private.why_unfused()
    if too_new:
        return too_new
    classes = [f"class {name}" for name in CLASSES if not hasattr(litgpt, name)]
    known = {field.name for field in dataclasses.fields(litgpt.Config)} | set(dir(litgpt.Config))
    have = installed("litgpt") or numbers(NEWEST)
    expected = [*SETTINGS, *(name for name, since in LATER.items() if have >= numbers(since.version))]
    missing = [*classes, *(name for name in expected if name not in known)]
    return f"this version of it has no {missing[0]}" if missing else ""

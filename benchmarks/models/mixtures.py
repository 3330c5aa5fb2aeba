"""Mixtures of experts of 2 to 4 GB: layers shaped as published ones, fewer of them; random weights.

As published models do, they hold bfloat16 numbers.
"""

from typing import Any

from litgpt.config import Config

# A published LitGPT config, and what is smaller here.
_SMALLER: dict[str, tuple[str, dict[str, Any]]] = {
    # 8 experts, 2 for a token; everything half as wide: 704 MB of experts in a layer
    "Mixtral-shaped": (
        "Mixtral-8x7B-v0.1",
        {"n_embd": 2048, "n_head": 16, "n_query_groups": 4, "intermediate_size": 7168, "n_layer": 4},
    ),
    # 128 experts, 8 for a token; its own widths: 1.2 GB of experts in a layer
    "Qwen3-MoE-shaped": ("Qwen3-30B-A3B", {"vocab_size": 32000, "padded_vocab_size": 32000, "n_layer": 2}),
}
NAMES = tuple(_SMALLER)


def config_of(name: str) -> Config:
    """Return the LitGPT config of one of `NAMES`."""
    published, smaller = _SMALLER[name]
    config: Config = Config.from_name(published, **smaller, block_size=4096)
    config.name = name
    return config

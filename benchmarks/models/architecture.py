"""Which of the architectures that are written for libraries other than LitGPT a model has."""

from litgpt.config import Config

LLAMA, MIXTRAL, QWEN3_MOE = "llama", "mixtral", "qwen3_moe"
MIXTURES = (MIXTRAL, QWEN3_MOE)


def architecture(config: Config) -> str | None:
    """Return the name that Transformers has for a model of this config, or None if it is of none of the three."""
    plain = config.rotary_percentage == 1.0 and config.rope_adjustments is None and not config.bias
    if config.norm_class_name != "RMSNorm" or not plain or config.parallel_residual:
        return None
    if config.mlp_class_name == "LLaMAMLP":
        return None if config.norm_qk else LLAMA
    if config.mlp_class_name != "LLaMAMoE" or config.n_expert_groups or config.n_shared_expert:
        return None
    return QWEN3_MOE if config.norm_qk else MIXTRAL

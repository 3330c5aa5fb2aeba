"""Which library function calls patch() under UPCAST=1."""

from types import ModuleType

from upcast import config
from upcast.integrations import diffusers, litgpt, litgpt_finetune, litgpt_scripts, transformers

ACTIVATIONS = {
    "litgpt.api": litgpt.activate,
    "litgpt.chat.base": litgpt_scripts.activate,
    "litgpt.finetune.adapter": litgpt_finetune.activate,
    "litgpt.finetune.adapter_v2": litgpt_finetune.activate,
    "litgpt.finetune.lora": litgpt_finetune.activate,
    "litgpt.finetune.lora_legacy": litgpt_finetune.activate,
    "litgpt.generate.base": litgpt_scripts.activate,
    "litgpt.generate.full": litgpt_scripts.activate,
    "litgpt.generate.speculative_decoding": litgpt_scripts.activate,
    "litgpt.generate.adapter": litgpt_scripts.activate_adapter,
    "litgpt.generate.adapter_v2": litgpt_scripts.activate_adapter,
    "litgpt.generate.sequentially": litgpt_scripts.activate_unpatched,
    "litgpt.generate.tp": litgpt_scripts.activate_unpatched,
    "transformers.modeling_utils": transformers.activate,
    "diffusers.models.modeling_utils": diffusers.activate,
}


def activate(module: ModuleType) -> None:
    """Wrap the loaders of ``module``, one of the keys of ACTIVATIONS, if the environment asks for it.

    Raises:
        UpcastError: a variable of the environment has an unknown value.
    """
    if config.read().enabled:
        ACTIVATIONS[module.__name__](module)

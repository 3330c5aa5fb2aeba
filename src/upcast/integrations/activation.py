"""Which library function calls patch() under UPCAST=1."""

from types import ModuleType

from upcast.core import config
from upcast.integrations import diffusers
from upcast.integrations.litgpt import finetune, packed_folders, scripts
from upcast.integrations.litgpt import load as litgpt
from upcast.integrations.transformers import load as transformers
from upcast.integrations.transformers import pipeline

ACTIVATIONS = {
    "litgpt.api": litgpt.activate,
    "litgpt.chat.base": scripts.activate,
    "litgpt.deploy.serve": packed_folders.activate,
    "litgpt.eval.evaluate": packed_folders.activate,
    "litgpt.finetune.adapter": finetune.activate,
    "litgpt.finetune.adapter_v2": finetune.activate,
    "litgpt.finetune.lora": finetune.activate,
    "litgpt.finetune.lora_legacy": finetune.activate,
    "litgpt.generate.base": scripts.activate,
    "litgpt.generate.full": scripts.activate,
    "litgpt.generate.speculative_decoding": scripts.activate,
    "litgpt.generate.adapter": scripts.activate_adapter,
    "litgpt.generate.adapter_v2": scripts.activate_adapter,
    "litgpt.generate.sequentially": scripts.activate_unpatched,
    "litgpt.generate.tp": scripts.activate_unpatched,
    "transformers.modeling_utils": transformers.activate,
    "transformers.pipelines.base": pipeline.activate,
    "diffusers.models.modeling_utils": diffusers.activate,
}


def activate(module: ModuleType) -> None:
    """Wrap the loaders of ``module``, one of the keys of ACTIVATIONS, if the environment asks for it.

    Raises:
        UpcastError: a variable of the environment has an unknown value.
    """
    if config.read().enabled:
        ACTIVATIONS[module.__name__](module)

"""Which library function calls patch() under UPCAST=1."""

from types import ModuleType

from upcast import config
from upcast.integrations import diffusers, litgpt, transformers

ACTIVATIONS = {
    "litgpt.api": litgpt.activate,
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

"""``pipeline(...)`` on a Mac: without a device it takes its model to MPS; a model that UPCAST=1 patched stays.

Who names a device, MPS or another, gets what Transformers gives.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from upcast.integrations import stepping_aside
from upcast.tensor.half_weight import HalfWeight


def activate(module: ModuleType) -> None:
    """Have ``Pipeline`` of ``transformers.pipelines.base`` leave a patched model where it is, unless told otherwise."""
    stepping_aside.wrap(module, {"Pipeline.__init__": _init})


def _init(wrapped: Callable[..., Any], pipeline: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.backends.mps.is_available() and not torch.cuda.is_available() and stepping_aside.enabled():
        given = inspect.signature(wrapped).bind_partial(*args, **kwargs).arguments
        if given.get("device") is None and _patched(given.get("model")):
            stepping_aside.say_once("a pipeline chose the CPU, where upcast works, not MPS; device='mps' asks for that")
            kwargs = {**kwargs, "device": torch.device("cpu")}
    return wrapped(*args, **kwargs)


def _patched(model: Any) -> bool:
    """Whether something of the model is stored in float16, and nobody has spread it over devices."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return getattr(model, "hf_device_map", None) is None and any(isinstance(each, HalfWeight) for each in parameters)

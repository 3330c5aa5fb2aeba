"""Diffusers: from_pretrained of models, and so of pipelines, that gives patched models.

``load_model_dict_into_meta`` puts a state dict into a model on the meta device, each tensor in the dtype that the model
has there. Ours arrive in float16 where they are weights, and the meta tensors are told so first.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import Tensor, nn

from upcast.integrations import checkpoint_files, loading, stepping_aside
from upcast.integrations.stepping_aside import NotOurs


def install() -> None:
    """Wrap the loaders once; they do nothing unless asked to."""
    from diffusers.models import modeling_utils

    activate(modeling_utils)


def activate(module: ModuleType) -> None:
    """Make ``ModelMixin.from_pretrained`` of ``diffusers.models.modeling_utils`` give patched models."""
    from diffusers.models import model_loading_utils

    model_class: Any = module.ModelMixin
    if isinstance(inspect.getattr_static(model_class, "from_pretrained"), wrapt.FunctionWrapper):
        return
    stepping_aside.wrap(model_loading_utils, {"load_model_dict_into_meta": _into_meta})
    stepping_aside.wrap(module, {"ModelMixin.from_pretrained": loading.hook(_load)})


def _load(wrapped: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    loading.check_arguments(kwargs)
    checkpoint_files.check_folder(args, kwargs)
    return wrapped(*args, **loading.without_dtype(kwargs))


def _into_meta(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    ours = loading.current()
    if ours is None:
        return wrapped(*args, **kwargs)
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    if call.arguments.get("hf_quantizer") is not None:
        raise NotOurs("a quantized checkpoint")
    model, state = call.arguments["model"], call.arguments["state_dict"]
    ours.check(model)
    parameters = {name for name, _ in model.named_parameters()}
    for name in list(state):
        if name in parameters:
            state[name] = ours.arrive(name, state[name], exact=ours.exact(name))
            _expect(model, name, state[name])
    return wrapped(*call.args, **call.kwargs)


def _expect(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Tell the meta tensor of this name which dtype it will have."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[leaf]
    if old is not None and old.is_meta and old.dtype != tensor.dtype:
        module._parameters[leaf] = nn.Parameter(torch.empty_like(old, dtype=tensor.dtype), old.requires_grad)

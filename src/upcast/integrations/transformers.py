"""Transformers: from_pretrained under UPCAST=1."""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from upcast import config, console, patching
from upcast.errors import UpcastError

_nesting = threading.local()  # composed models call from_pretrained for their parts


def activate(module: ModuleType) -> None:
    """Make ``PreTrainedModel.from_pretrained`` of ``transformers.modeling_utils`` give patched models."""
    wrapt.wrap_function_wrapper(module, "PreTrainedModel.from_pretrained", _from_pretrained)


def _from_pretrained(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    if getattr(_nesting, "inside", False):
        return wrapped(*args, **kwargs)
    _nesting.inside = True
    try:
        result = wrapped(*args, **kwargs)
    finally:
        _nesting.inside = False
    model = result[0] if isinstance(result, tuple) else result  # (model, info) with output_loading_info=True
    try:
        patching.patch(model, policy=config.read().policy)
    except UpcastError as error:
        console.say(f"{type(model).__name__} runs as it is, unpatched: {error}")
    return result

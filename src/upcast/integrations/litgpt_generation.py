"""LitGPT's generation loops: of a patched model they compute the last position's logits only, all they read.

`litgpt.generate.base.next_token` and `batched_next_token` are wrapped while any fused model is patched; for other
models the wrappers do nothing. `model(x)` is not touched.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from upcast.integrations.litgpt_modules import hooked
from upcast.integrations.litgpt_stack import FusedGPT, last_position
from upcast.watch import unwatched

_NAMES = ("next_token", "batched_next_token")

_patched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def enter(gpt: nn.Module) -> None:
    """Have LitGPT's loops ask ``gpt`` for the last position only."""
    base = sys.modules.get("litgpt.generate.base")
    if base is None:
        return
    _patched.add(gpt)
    for name in _NAMES:
        function = getattr(base, name)
        if not hasattr(function, "_upcast_original"):
            setattr(base, name, _last_only(function))


def leave(gpt: nn.Module) -> None:
    """Undo `enter`; after the last model LitGPT's own functions are back."""
    _patched.discard(gpt)
    base = sys.modules.get("litgpt.generate.base")
    if base is None or len(_patched):
        return
    for name in _NAMES:
        function = getattr(base, name)
        setattr(base, name, getattr(function, "_upcast_original", function))


def _last_only(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def next_token(model: Any, *args: Any, **kwargs: Any) -> Any:
        gpt = None if torch.compiler.is_compiling() else _unwatched(model)
        if gpt is None:
            return original(model, *args, **kwargs)
        with last_position(gpt):
            return original(model, *args, **kwargs)

    next_token._upcast_original = original  # type: ignore[attr-defined]
    return next_token


def _unwatched(model: Any) -> nn.Module | None:
    """Return the fused GPT in ``model``, unless a wrapper around it is watched or is not Fabric's."""
    while type(model).__name__ == "_FabricModule" and not hooked(model):
        model = model._forward_module
    fused = isinstance(model, nn.Module) and isinstance(unwatched(model), FusedGPT)
    return model if fused else None

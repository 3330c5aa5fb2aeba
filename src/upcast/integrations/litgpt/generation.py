"""LitGPT's generation: of a patched model it computes the last position's logits only, and keeps its caches.

`next_token` and `batched_next_token` of `litgpt.generate.base` read no other logits, and `LLM.generate` asks for caches
for its next prompt, while `LLM.benchmark` measures whole ones. They are wrapped while any fused model is patched; for
other models the wrappers do nothing. `model(x)` is not touched.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from upcast.core import messages
from upcast.core.forward_override import in_effect
from upcast.integrations.fused import hooked
from upcast.integrations.litgpt.gpt import FusedGPT, last_position
from upcast.integrations.litgpt.prefix_cache import keeping, whole_prompts

_patched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_told: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models of which it was said that they are not compiled


def enter(gpt: nn.Module) -> None:
    """Have LitGPT's generation know that ``gpt`` is fused."""
    _patched.add(gpt)
    _settle()


def leave(gpt: nn.Module) -> None:
    """Undo `enter`; after the last model LitGPT's own functions are back."""
    _patched.discard(gpt)
    _settle()


def _settle() -> None:
    """Wrap LitGPT's functions where a model needs it, or unwrap them; again where another thread's came or went.

    Not under a lock: an interruption could leave it locked.
    """
    while differing := [each for each in _wrapped() if _is_wrapped(*each) != bool(len(_patched))]:
        for owner, name, wrapper in differing:
            function = getattr(owner, name)
            original = getattr(function, "_upcast_original", function)
            setattr(owner, name, wrapper(original) if len(_patched) else original)


def _is_wrapped(owner: Any, name: str, _: object) -> bool:
    return hasattr(getattr(owner, name), "_upcast_original")


def _wrapped() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """Yield (owner, name, wrapper) for what is loaded of LitGPT, and is there in its version."""
    base, llm = sys.modules.get("litgpt.generate.base"), getattr(sys.modules.get("litgpt.api"), "LLM", None)
    for name in ("next_token", "batched_next_token"):
        if hasattr(base, name):
            yield base, name, _last_only
    for name, wrapper in (("generate", _keeping), ("benchmark", _whole)):
        if hasattr(llm, name):
            yield llm, name, wrapper


def _last_only(original: Callable[..., Any]) -> Callable[..., Any]:
    return _within(last_position, original, lambda model: model)


def _keeping(original: Callable[..., Any]) -> Callable[..., Any]:
    return _within(keeping, original, lambda llm: llm.model)


def _whole(original: Callable[..., Any]) -> Callable[..., Any]:
    return _within(whole_prompts, original, lambda llm: llm.model)


def _within(
    call: Callable[[Any, Callable[[], Any]], Any], original: Callable[..., Any], model_of: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return ``original``, run by ``call(gpt, ...)`` where its first argument's model is a fused GPT.

    Where torch.compile traces it (LitGPT's ``--compile``), the fused forwards run as they are: they are faster than
    what would be compiled, and whether a value fits float16 is asked of numbers, which a graph does not have.
    """
    own = _uncompiled(original)  # LitGPT's scripts compile before they load, and so before this wraps

    def run(gpt: nn.Module, compiling: bool, *args: Any, **kwargs: Any) -> Any:
        if compiling or own is not original:
            _say_once(gpt)
        return call(gpt, lambda: own(*args, **kwargs))

    eager: Callable[..., Any] = torch.compiler.disable(run)

    @functools.wraps(original)
    def wrapper(first: Any, *args: Any, **kwargs: Any) -> Any:
        gpt = _unwatched(model_of(first))
        if gpt is None:
            return original(first, *args, **kwargs)
        return eager(gpt, torch.compiler.is_compiling(), first, *args, **kwargs)

    wrapper._upcast_original = original  # type: ignore[attr-defined]
    return wrapper


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch.compile was given to make ``function``, or the function itself."""
    made_of: Callable[..., Any] = getattr(function, "_torchdynamo_orig_callable", function)
    return made_of


def _say_once(gpt: nn.Module) -> None:
    if gpt not in _told:
        _told.add(gpt)
        messages.say(
            f"{type(gpt).__name__} is not compiled: its fused forwards run, which are faster and need no warm-up"
        )


def _unwatched(model: Any) -> nn.Module | None:
    """Return the fused GPT in ``model``, unless a wrapper around it is watched or is not Fabric's."""
    while type(model).__name__ == "_FabricModule" and not hooked(model):
        model = model._forward_module
    fused = isinstance(model, nn.Module) and isinstance(in_effect(model), FusedGPT)
    return model if fused else None

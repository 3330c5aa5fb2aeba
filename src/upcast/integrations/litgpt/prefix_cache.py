"""A prompt that begins like the one before: its keys and values are in LitGPT's caches, and only the rest is computed.

LitGPT's ``LLM.generate`` throws its caches away before each prompt. Within `keeping` they stay, and longer ones take
over what they hold. It is used again only where all that it was computed from is the same byte for byte: the weights,
the tokens' embeddings, the angles, and the caches themselves. Whoever writes to memory need not say so (``.data``,
numpy, a tensor of ``state_dict()``, a file that is mapped), so that all of it is read, once per prompt, and checksums
are compared. That takes about as long as one token.

What is known is what was computed while nothing but LitGPT's own loop ran: the prompt, and within `keeping` the answer
to it. Of an answer that is streamed only the prompt counts.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upcast.core import scopes
from upcast.core.forward_override import Forward, in_effect
from upcast.kernels import native

# .gpt: the model whose caches this thread wants to keep; .caches: their ids; .off: it wants to keep none
_kept: Any = threading.local()


class Held:
    """The tokens, from position 0 on, whose keys and values the caches of one model hold."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.made_with: Any = None  # what they were computed from
        self.sealed: Any = None  # what their rows and the like were, when user code could run again
        self.wanted = False  # the next prompt is one of LLM.generate
        self.left: list[Any] = []  # caches that the model gave up, until others take over
        self.stale = 0  # rows that LitGPT would have made zero before the next prompt

    def __reduce__(self) -> Any:
        return (Held, ())  # a copy of a model computes its first prompt whole

    def forget(self) -> None:
        """Note that the caches hold nothing that is known."""
        self.tokens, self.made_with, self.sealed = [], None, None

    def shared(self, tokens: Sequence[int], made_with: Any, rows: Any) -> int:
        """Return how many of ``tokens`` need no computation: never all, for the last one's logits are wanted.

        ``rows(tokens)`` tells what the caches and the like hold for so many tokens.
        """
        most = min(len(tokens) - 1, len(self.tokens))
        same = next((i for i in range(most) if tokens[i] != self.tokens[i]), most)
        if not same or self.sealed is None or self.made_with != made_with or rows(self.tokens) != self.sealed:
            return 0
        return same

    def clear(self, caches: Sequence[Any], start: int) -> None:
        """Make the rows from ``start`` on zero that LitGPT would have.

        Not under torch.inference_mode: it is Python code, and an interruption as it is left would leave it on.
        """
        if self.stale > start:
            with torch._C._InferenceMode(True):  # what was made in it can be written to there alone
                for buffer in rows_of(caches):
                    buffer[:, :, start : self.stale].zero_()
        self.stale = 0

    def take_over(self, caches: Sequence[Any]) -> None:
        """Copy what the given-up caches hold into ``caches``, as far as it fits."""
        left, self.left = self.left, []
        count = len(self.tokens)
        pairs = list(zip(rows_of(caches), rows_of(left), strict=False))
        if not pairs or len(left) != len(caches) or not all(_alike(new, old, count) for new, old in pairs):
            self.forget()
            return
        self.stale = count
        with torch._C._InferenceMode(True):
            for new, old in pairs:
                new[:, :, :count].copy_(old[:, :, :count])


def _alike(new: Tensor, old: Tensor, count: int) -> bool:
    """Whether ``count`` rows of one cache can stand in the other."""
    fits = count <= min(new.shape[2], old.shape[2]) and new.device == old.device
    return fits and (*new.shape[:2], new.shape[3], new.dtype) == (*old.shape[:2], old.shape[3], old.dtype)


def rows_of(caches: Sequence[Any]) -> list[Tensor]:
    """Return keys and values of all caches, (B, Hkv, S, D) each."""
    return [each for cache in caches for each in (cache.k, cache.v)]


def content(tensors: Sequence[Tensor]) -> Any:
    """Return what tells whether ``tensors`` differ, in any bit; None where that is not known."""
    plain = [*tensors]
    known = all(type(each) in (Tensor, nn.Parameter) and each.dtype in _KNOWN and each.is_cpu for each in plain)
    if not known or not native.available():
        return None
    bits = [each.detach() if each.dtype != torch.uint8 else each.view(torch.float16) for each in plain]  # packed
    return native.digest(bits), [(each.shape, each.dtype) for each in plain]


_KNOWN = (torch.float16, torch.float32, torch.uint8)


# --- whose caches stay ------------------------------------------------------------------------------------------------


def keeping(gpt: nn.Module, function: Callable[[], Any]) -> Any:
    """Return what ``function`` gives, a call of LLM.generate; meanwhile this thread gives up no cache of ``gpt``.

    It wants longer ones, or a new prompt.
    """
    held = held_of(gpt)
    if held is None or getattr(_kept, "off", False):
        return function()
    caches = frozenset(map(id, caches_of(gpt)))
    try:
        held.wanted = True
        result = scopes.within(_kept, "caches", caches, lambda: scopes.within(_kept, "gpt", gpt, function))
        held.left = []
        seal(gpt)
    except BaseException:  # cut short: what the caches hold is not known
        held.left = []
        held.forget()
        raise
    return result


def whole_prompts(_: nn.Module, function: Callable[[], Any]) -> Any:
    """Return what ``function`` gives, a measurement of how long prompts take; all of each is computed."""
    return scopes.within(_kept, "off", True, function)


def kept(gpt: Any) -> bool:
    """Whether this thread keeps the caches of ``gpt``, and they hold something."""
    held = held_of(gpt)
    return held is not None and bool(held.tokens) and getattr(_kept, "gpt", None) is gpt


def in_one_call(gpt: nn.Module) -> bool:
    """Whether this thread is within `keeping` for ``gpt``: nothing but LitGPT runs between its steps."""
    return getattr(_kept, "gpt", None) is gpt


def seal(gpt: Any) -> None:
    """Note what the caches hold for the tokens that are known: from here on anyone may write to them."""
    forward = in_effect(gpt)
    held = held_of(gpt)
    if held is not None and held.tokens and held.sealed is None:
        held.sealed = forward.rows(held.tokens)


class CacheReset(Forward):
    """``reset_parameters`` of one cache."""

    owner = "litgpt"
    method = "reset_parameters"

    def __call__(self) -> None:
        """Fill the cache with zeros, as LitGPT does; where its model's caches are kept, later, and what is left."""
        cache, gpt = self.module, getattr(_kept, "gpt", None)
        held = held_of(gpt)
        if held is not None and kept(gpt) and id(cache) in _kept.caches:
            held.stale = max(held.stale, cache.k.shape[2])
            return
        type(cache).reset_parameters(cache)


class CacheClearer(Forward):
    """``clear_kv_cache`` of one GPT."""

    owner = "litgpt"
    method = "clear_kv_cache"

    def __call__(self) -> None:
        """Drop the caches, as LitGPT does; where they are kept, only until others are there."""
        gpt = self.module
        held = held_of(gpt)
        if held is not None and kept(gpt):
            held.left = caches_of(gpt)
        type(gpt).clear_kv_cache(gpt)
        drop(gpt)


def drop(gpt: Any) -> None:
    """Have the fused forward of ``gpt`` let go of the caches that it had."""
    forward = in_effect(gpt)
    if held_of(gpt) is not None:
        forward.stack = None


def held_of(gpt: Any) -> Held | None:
    """Return what the caches of a fused GPT hold."""
    held = getattr(in_effect(gpt), "held", None) if isinstance(gpt, nn.Module) else None
    return held if isinstance(held, Held) else None


def caches_of(gpt: Any) -> list[Any]:
    """Return the caches of all blocks, or none where one is missing or is not what LitGPT makes."""
    caches = [getattr(block.attn, "kv_cache", None) for block in gpt.transformer.h]
    rows = [getattr(cache, name, None) for cache in caches for name in ("k", "v")]
    return caches if all(isinstance(each, Tensor) and each.dim() == 4 for each in rows) else []

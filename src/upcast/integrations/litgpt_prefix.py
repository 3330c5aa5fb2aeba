"""A prompt that begins like the one before: its keys and values are in LitGPT's caches, and only the rest is computed.

Every cache that the fused model fills carries a mark, the `Held` of that model. Whoever else writes into the cache
takes the mark away, so what is held is known or not used. LitGPT's ``LLM.generate`` throws its caches away before each
prompt; within `keeping` they stay, and longer ones take over what they hold.
"""

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from upcast import scopes
from upcast.forward import Forward
from upcast.watch import unwatched

_MARK = "_upcast_held"
_kept: Any = threading.local()  # .held: the Held of the model whose caches this thread wants to keep


class MadeWith:
    """What keys and values depend on beside the tokens: weights, as they are now, and numbers."""

    def __init__(self, weights: list[Tensor], numbers: tuple[Any, ...]) -> None:
        self.weights, self.numbers = weights, numbers
        # How often each was written in place; of tensors made in inference mode torch does not count it.
        self.versions = [None if weight.is_inference() else weight._version for weight in weights]

    def same(self, other: "MadeWith") -> bool:
        """Whether neither a weight nor a number differs, for sure."""
        if len(self.weights) != len(other.weights) or self.versions != other.versions or None in self.versions:
            return False
        return all(map(operator.is_, self.weights, other.weights)) and self.numbers == other.numbers


class Held:
    """The tokens, from position 0 on, whose keys and values the caches of one model hold."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.made_with: MadeWith | None = None
        self.left: list[Any] = []  # caches that the model gave up, until others take over

    def __reduce__(self) -> Any:
        return (Held, ())  # a copy of a model computes its first prompt whole

    def shared(self, tokens: Sequence[int], caches: Sequence[Any], made_with: MadeWith) -> int:
        """Return how many of ``tokens`` need no computation: never all, for the last one's logits are wanted."""
        if self.made_with is None or not all(map(self._owns, caches)) or not self.made_with.same(made_with):
            return 0
        most = min(len(tokens) - 1, len(self.tokens))
        return next((i for i in range(most) if tokens[i] != self.tokens[i]), most)

    def _owns(self, cache: Any) -> bool:
        """Whether ``cache`` holds these tokens: a ring that went around has lost the first ones."""
        return cache.__dict__.get(_MARK) is self and len(self.tokens) <= cache.k.shape[2]

    def put(self, start: int, tokens: Sequence[int], caches: Sequence[Any], made_with: MadeWith | None) -> None:
        """Note that the model has filled ``caches`` with ``tokens`` from ``start`` on; nothing counts behind them.

        ``made_with`` comes with a prompt, at position 0.
        """
        if start == 0:
            self.made_with = made_with
            for cache in caches:
                cache.__dict__[_MARK] = self
        if start > len(self.tokens):
            self.tokens = []  # there is a gap
            return
        del self.tokens[start:]
        self.tokens.extend(tokens)

    def take_over(self, caches: Sequence[Any]) -> None:
        """Copy what the given-up caches hold into ``caches``, as far as it fits."""
        left, self.left = self.left, []
        count = len(self.tokens)
        pairs = list(zip(left, caches, strict=False))
        if not pairs or not all(self._owns(old) and _alike(old, new, count) for old, new in pairs):
            return
        for old, new in pairs:
            for into, source in ((new.k, old.k), (new.v, old.v)):
                into[:, :, :count].copy_(source[:, :, :count])
            new.__dict__[_MARK] = self


def _alike(old: Any, new: Any, count: int) -> bool:
    """Whether ``count`` rows of one cache can stand in the other."""
    for one, two in ((old.k, new.k), (old.v, new.v)):
        same = (*one.shape[:2], one.shape[3], one.dtype) == (*two.shape[:2], two.shape[3], two.dtype)
        if not same or count > two.shape[2]:
            return False
    return True


def forget(cache: Any) -> None:
    """Note that someone else writes into ``cache``."""
    cache.__dict__.pop(_MARK, None)


def keeping(gpt: nn.Module, function: Callable[[], Any]) -> Any:
    """Return what ``function`` gives; meanwhile this thread gives up no cache of ``gpt``.

    It wants longer ones, or a new prompt.
    """
    held = held_of(gpt)
    return scopes.within(held or Held(), "left", [], lambda: scopes.within(_kept, "held", held, function))


def kept(held: Held | None) -> bool:
    """Whether this thread keeps the caches of that model."""
    return held is not None and getattr(_kept, "held", None) is held


class CacheReset(Forward):
    """``reset_parameters`` of one cache."""

    def __call__(self) -> None:
        """Fill the cache with zeros, as LitGPT does; nothing where its model's caches are kept."""
        cache = self.module
        if kept(cache.__dict__.get(_MARK)):
            return
        forget(cache)
        type(cache).reset_parameters(cache)


class CacheClearer(Forward):
    """``clear_kv_cache`` of one GPT."""

    def __call__(self) -> None:
        """Drop the caches, as LitGPT does; where they are kept, only until others are there."""
        gpt = self.module
        held = held_of(gpt)
        if held is not None and kept(held):
            held.left = caches_of(gpt)
        type(gpt).clear_kv_cache(gpt)


def held_of(gpt: Any) -> Held | None:
    """Return what the caches of a fused GPT hold."""
    held = getattr(unwatched(gpt), "held", None)
    return held if isinstance(held, Held) else None


def caches_of(gpt: Any) -> list[Any]:
    """Return the caches of all blocks, or none where one is missing."""
    caches = [getattr(block.attn, "kv_cache", None) for block in gpt.transformer.h]
    return [] if None in caches else caches

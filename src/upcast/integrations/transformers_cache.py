"""Transformers' KV caches in float16: twins of its cache layers that a patched model is given before it runs.

``generate`` makes its cache itself, so the layers of a cache change their class on the way into a patched model. They
store float16 and hand out `HalfWeight`: float32 to the model's code, float16 to the attention kernel. A prompt's first
attention sees its own float32 keys and values. A layer that meets a value beyond 65504, or anything else that a twin
does not cover, becomes Transformers' own layer again.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from upcast import console, kernels
from upcast.genuine import Root, is_own, originals
from upcast.half_weight import HalfWeight
from upcast.store import Fallbacks

_ROOM = 64  # positions added at once, at least
_handed_out = Fallbacks()  # what is widened of a cache are rows in use, not weights: counted apart


@functools.cache
def twins() -> dict[type, type]:
    """Return cache layer of Transformers -> its float16 twin; none where caches have no layers (before 4.54)."""
    from transformers import cache_utils

    if not hasattr(cache_utils, "DynamicSlidingWindowLayer"):
        return {}

    def twin(name: str, ours: type, original: type) -> type:
        # One base and the methods of ours: with two bases, an object could not change its class.
        methods = {key: value for kind in (_Twin, ours) for key, value in vars(kind).items() if callable(value)}
        return type(name, (original,), {**methods, "original": original})

    return {
        cache_utils.DynamicLayer: twin("HalfDynamicLayer", _Growing, cache_utils.DynamicLayer),
        cache_utils.DynamicSlidingWindowLayer: twin(
            "HalfSlidingWindowLayer", _Sliding, cache_utils.DynamicSlidingWindowLayer
        ),
        cache_utils.StaticLayer: twin("HalfStaticLayer", _Static, cache_utils.StaticLayer),
    }


def narrow(cache: Any) -> None:
    """Turn the layers of a cache to their float16 twins, with what they hold; other layers and caches stay."""
    for part in (getattr(cache, "self_attention_cache", None), getattr(cache, "cross_attention_cache", None)):
        if part is not None:
            narrow(part)
    if getattr(cache, "offloading", True) or not twins():  # an offloading cache moves its tensors itself
        return
    if not is_own(type(cache), type(cache).__name__, "transformers"):  # a cache of the user's may do anything
        return
    for layer in cache.layers:
        kind: type = type(layer)
        twin = twins().get(kind)
        if twin is not None and not layer.is_initialized and originals(_roots, kind).intact():
            layer.__class__ = twin
    replicated = cache.layer_class_to_replicate
    cache.layer_class_to_replicate = twins().get(replicated, replicated)


def _roots(layer: type) -> list[Root]:
    return [(layer, "update"), (layer, "lazy_initialization")]


def growing(cache: Any, index: int) -> Any:
    """Return the layer ``index`` of a cache if it is the twin of a DynamicLayer, or None."""
    from transformers import cache_utils

    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    return layer if type(layer) is twins()[cache_utils.DynamicLayer] else None


class _Twin:
    """What the twins share. ``keys`` and ``values`` are `HalfWeight`, or what the last reordering made of them."""

    original: Any
    keys: Any
    values: Any
    is_initialized: bool

    def update(self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values in float16 and return all rows."""
        own = originals(_roots, self.original).intact()
        if not own or not all(map(_storable, (key_states, value_states))):
            return self._give_up(key_states, value_states, cache_kwargs, "")
        stored = self._store(key_states, value_states, cache_kwargs)
        if stored is None:
            why = "it met a value beyond 65504, where float16 ends"
            return self._give_up(key_states, value_states, cache_kwargs, why)
        return stored

    def _store(self, keys: Tensor, values: Tensor, settings: Any) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if isinstance(self.keys, HalfWeight):
            self.keys, self.values = (_out(held.stored[indices]) for held in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, as beam search does after each token."""
        self.batch_select_indices(beam_idx)

    def _give_up(self, keys: Tensor, values: Tensor, settings: Any, why: str) -> tuple[Tensor, Tensor]:
        """Become Transformers' own layer, in float32; in float16 for a model that computes its rows in that."""
        self.__class__ = self.original
        self.dtype = torch.float16 if keys.dtype == torch.float16 else torch.float32
        for name in ("keys", "values"):
            held = getattr(self, name, None)
            if isinstance(held, HalfWeight):
                setattr(self, name, held.stored if self.dtype == torch.float16 else held.widened())
        if why:
            console.say(f"a layer of the KV cache goes to float32: {why}")
        full: tuple[Tensor, Tensor] = self.update(keys, values, settings)
        return full


def _storable(states: Tensor) -> bool:
    plain = type(states) is Tensor and states.dtype == torch.float32 and states.dim() == 4
    return plain and not (torch.is_grad_enabled() and states.requires_grad) and not torch.compiler.is_compiling()


def _half(states: Tensor) -> Tensor | None:
    """Return ``states`` in float16, or None if a finite value does not fit."""
    half = states.half()
    return None if bool((half.isinf() & states.isfinite()).any()) else half


def _out(stored: Tensor) -> HalfWeight:
    return HalfWeight(stored, _handed_out)


class _Growing(_Twin):
    """DynamicLayer: buffers with room, so that a token costs its own rows and not a copy of all."""

    def _store(self, keys: Tensor, values: Tensor, settings: Any) -> tuple[Tensor, Tensor] | None:
        before: int = self.get_seq_length()  # type: ignore[attr-defined]
        after = before + keys.shape[2]
        buffers = self._room(keys, values, before, after)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            if not kernels.active().kv_append(buffer, new, before):
                return None
        self.advance(after)
        self.dtype, self.device, self.is_initialized = torch.float32, keys.device, True
        return (keys, values) if before == 0 else (self.keys, self.values)

    def reserve(self) -> tuple[Tensor, Tensor, int] | None:
        """Return float16 keys and values (B, H, S, D) with room for one more row, and how many they hold; or None."""
        if not isinstance(self.keys, HalfWeight) or not isinstance(self.values, HalfWeight):
            return None
        rows = self.keys.shape[2]
        return (*self._room(self.keys, self.values, rows, rows + 1), rows) if rows else None

    def advance(self, rows: int) -> None:
        """Say that the buffers hold ``rows`` rows now."""
        keys, values = self._buffers
        self.keys, self.values = _out(keys[:, :, :rows]), _out(values[:, :, :rows])

    def _room(self, keys: Tensor, values: Tensor, before: int, after: int) -> tuple[Tensor, Tensor]:
        """Return buffers that hold the first ``before`` rows and have room for ``after``."""
        buffers: tuple[Tensor, Tensor] | None = self.__dict__.get("_buffers")
        if buffers is not None and before and self._holds(buffers) and after <= buffers[0].shape[2]:
            return buffers
        room = after + max(_ROOM, after // 2) if before else after + _ROOM
        made = []
        for new, held in ((keys, self.__dict__.get("keys")), (values, self.__dict__.get("values"))):
            buffer = torch.empty((*new.shape[:2], room, new.shape[3]), dtype=torch.float16)
            if before and held is not None:
                buffer[:, :, :before] = held.stored if isinstance(held, HalfWeight) else held
            made.append(buffer)
        self._buffers = made[0], made[1]
        return self._buffers

    def _holds(self, buffers: tuple[Tensor, Tensor]) -> bool:
        """Whether keys and values still are the first rows of the buffers: beams reorder them, crops shorten them."""
        return all(
            isinstance(held, HalfWeight)
            and held.stored.data_ptr() == buffer.data_ptr()
            and held.stored.stride() == buffer.stride()
            and held.shape[:2] == buffer.shape[:2]
            for held, buffer in zip((self.keys, self.values), buffers, strict=True)
        )


class _Sliding(_Twin):
    """DynamicSlidingWindowLayer: the window is kept in float16; its rows are returned in float32, with the new ones."""

    def _store(self, keys: Tensor, values: Tensor, settings: Any) -> tuple[Tensor, Tensor] | None:
        if _half(keys) is None or _half(values) is None:
            return None
        full: tuple[Tensor, Tensor] = self.original.update(self, keys, values, settings)
        self.keys, self.values = _out(self.keys.half()), _out(self.values.half())
        return full


class _Static(_Twin):
    """StaticLayer: allocated once in float16."""

    def _store(self, keys: Tensor, values: Tensor, settings: Any) -> tuple[Tensor, Tensor] | None:
        halves = _half(keys), _half(values)
        if halves[0] is None or halves[1] is None:
            return None
        if not self.is_initialized:
            takes = len(inspect.signature(self.original.lazy_initialization).parameters) - 1
            self.lazy_initialization(*halves[:takes])  # type: ignore[attr-defined]  # before 5 it took the keys alone
            self.dtype, self.keys, self.values = torch.float32, _out(self.keys), _out(self.values)
        positions = (settings or {}).get("cache_position")
        if positions is None:
            positions = torch.arange(keys.shape[2])
        for buffer, half in zip((self.keys, self.values), halves, strict=True):
            buffer.stored.index_copy_(2, positions, half)
        return self.keys, self.values

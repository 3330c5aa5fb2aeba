"""Transformers' KV caches in float16: a half layer for each kind of its cache layers.

``generate`` makes its cache itself, so the layers of a cache change their class on the way into a patched model. They
store float16 and hand out `HalfWeight`: float32 to the model's code, float16 to the attention kernel. A prompt's first
attention sees its own float32 keys and values. A layer that meets keys or values that are not for float16, or anything
else that a half layer does not cover, becomes Transformers' own layer again; so are those that take its place in later
caches of the model. A model that is given no cache makes one of its own, in float32; it is narrowed when it comes back
with the next token. Pickled, it is Transformers' own layer with float32 tensors.
"""

import copy
import copyreg
import functools
import inspect
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upcast import kernels
from upcast.core import messages
from upcast.integrations.transformers.row_buffers import RowBuffers, hand_out
from upcast.integrations.transformers.versions import narrows_caches
from upcast.kernels import reference, transforms
from upcast.tensor import autocast
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT, WHY_FLOAT32
from upcast.tensor.genuine import Root, is_own, originals
from upcast.tensor.half_weight import HalfWeight

_ROOM = 64  # positions added at once, at least
_beyond: weakref.WeakSet[Any] = weakref.WeakSet()  # layers that stay in float32: they are asked once
Settings = tuple[tuple[Any, ...], dict[str, Any]]  # what a version hands to a layer beside keys and values
LayerKey = tuple[str, int]  # what the cache is of, "" or "cross-attention", and the layer's index
# What the model of a half layer knows of its caches: the layers that are not for float16, and which one it is.
_homes: weakref.WeakKeyDictionary[Any, tuple[set[LayerKey], LayerKey]] = weakref.WeakKeyDictionary()


@functools.cache
def half_layers() -> dict[type, type]:
    """Return cache layer of Transformers -> its half layer; none where caches do not say enough (before 4.57)."""
    from transformers import cache_utils

    if not narrows_caches():
        return {}

    def half_layer(name: str, ours: type, original: type) -> Any:
        # One base and the methods of ours: with two bases, an object could not change its class.
        methods = {key: value for kind in (_HalfLayer, ours) for key, value in vars(kind).items() if callable(value)}
        return kind_of(name, (original,), {**methods, "original": original})

    kind_of = _kind_of_half_layers(type(cache_utils.DynamicLayer))

    return {
        cache_utils.DynamicLayer: half_layer("HalfDynamicLayer", _Growing, cache_utils.DynamicLayer),
        cache_utils.DynamicSlidingWindowLayer: half_layer(
            "HalfSlidingWindowLayer", _Sliding, cache_utils.DynamicSlidingWindowLayer
        ),
        cache_utils.StaticLayer: half_layer("HalfStaticLayer", _Static, cache_utils.StaticLayer),
    }


def _kind_of_half_layers(kind: type) -> Any:
    """Return a metaclass whose classes pickle as those that they stand for: a cache names its layers' class."""
    kind_of_half = type("HalfLayerType", (kind,), {})
    reduce: Any = lambda cls: (operator.getitem, ((cls.original,), 0))  # noqa: E731
    copyreg.pickle(kind_of_half, reduce)
    return kind_of_half


def downcast(cache: Any, wide: set[LayerKey], part: str = "", *, compiled: bool = False) -> None:
    """Turn the layers of a cache to half layers, with what they hold; other layers and caches stay.

    Those in ``wide`` stay too, and half layers that cannot go on add theirs. ``compiled``: the model's call is
    compiled. Then static layers stay too: torch.compile takes their tensors as they are, and cannot follow the question
    whether new rows fit.
    """
    for name, inner in (("", "self_attention_cache"), ("cross-attention", "cross_attention_cache")):
        if getattr(cache, inner, None) is not None:
            downcast(getattr(cache, inner), wide, name, compiled=compiled)
    if getattr(cache, "offloading", True) or not half_layers():  # an offloading cache moves its tensors itself
        return
    if not is_own(type(cache), type(cache).__name__, "transformers"):  # a cache of the user's may do anything
        return
    for index, layer in enumerate(cache.layers):
        kind: type = type(layer)
        half = half_layers().get(kind)
        if compiled and not hasattr(layer, "crop"):
            _beyond.add(layer)  # the models inside of this one are asked too
        if half is None or layer in _beyond or (part, index) in wide or not originals(_roots, kind).intact():
            continue
        _homes[layer] = wide, (part, index)
        if not layer.is_initialized:
            layer.__class__ = half
        elif hasattr(layer, "crop"):  # static ones have their addresses
            _adopt(layer, half)
    replicated = cache.layer_class_to_replicate
    cache.layer_class_to_replicate = half_layers().get(replicated, replicated)


def _roots(layer: type) -> list[Root]:
    return [(layer, "update"), (layer, "lazy_initialization")]


def _adopt(layer: Any, half: type) -> None:
    """Turn a layer that holds float32 rows to its half layer, unless that would lose a value or a gradient."""
    held = layer.keys, layer.values
    if not all(_storable(states) and not states.requires_grad for states in held):
        return
    keys, values = _half(layer.keys, KEY_LIMIT), _half(layer.values, VALUE_LIMIT)
    if keys is None or values is None:
        _keep_wide(layer, "stays in")
        return
    layer.__class__ = half
    layer.keys, layer.values = hand_out(keys), hand_out(values)


def growing(cache: Any, indices: Sequence[int]) -> list[Any]:
    """Return the layers of a cache by their indices; None for one that is not the half layer for a DynamicLayer."""
    layers, kind = getattr(cache, "layers", ()), _kind_that_grows()
    found = [layers[index] if index < len(layers) else None for index in indices]
    return [layer if type(layer) is kind else None for layer in found]


@functools.cache
def _kind_that_grows() -> type | None:
    from transformers import cache_utils

    return half_layers().get(cache_utils.DynamicLayer)


class _HalfLayer:
    """What half layers share. ``keys`` and ``values`` are `HalfWeight`, or what the last reordering made of them."""

    original: Any
    keys: Any
    values: Any
    is_initialized: bool

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values in float16 and return all rows."""
        own = torch.compiler.is_compiling() or originals(_roots, self.original).intact()
        if not own or not all(map(_storable, (key_states, value_states))) or not self._holds_halves():
            return self._give_up(key_states, value_states, (args, kwargs))
        stored = self._store(key_states, value_states, (args, kwargs))
        if stored is None:
            _keep_wide(self, "goes to")
            return self._give_up(key_states, value_states, (args, kwargs))
        return stored

    def _holds_halves(self) -> bool:
        """Whether keys and values are float16, or now are: someone may have assigned others that float16 holds."""
        for name, limit in (("keys", KEY_LIMIT), ("values", VALUE_LIMIT)):
            held = getattr(self, name, None)
            if held is None or isinstance(held, HalfWeight) or not held.numel():
                continue
            half = _half(held, limit) if _storable(held) and not held.requires_grad else None
            if half is None:
                return False
            setattr(self, name, hand_out(half))
        return True

    def _store(self, keys: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def _settled(self) -> dict[str, Any]:
        """Return the fields, all of them in place."""
        return self.__dict__

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if isinstance(self.keys, HalfWeight):
            self.keys, self.values = (hand_out(held.stored[indices]) for held in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, as beam search does after each token."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch, as assisted generation does."""
        if isinstance(self.keys, HalfWeight):
            held = (self.keys.stored, self.values.stored)
            self.keys, self.values = (hand_out(each.repeat_interleave(repeats, dim=0)) for each in held)

    def __copy__(self) -> Any:
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self._settled())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        for name, value in self._settled().items():
            if name != "_buffers":
                held = isinstance(value, HalfWeight)
                new.__dict__[name] = hand_out(value.stored.clone()) if held else copy.deepcopy(value, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        fields = {name: value for name, value in self._settled().items() if name != "_buffers"}
        plain = {name: value.upcast() if isinstance(value, HalfWeight) else value for name, value in fields.items()}
        return copyreg._reconstructor, (self.original, object, None), plain  # type: ignore[attr-defined]

    def _give_up(self, keys: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        """Become Transformers' own layer, in float32; in float16 for a model that computes its rows in that."""
        original = self.original
        self._settled()
        if (
            not torch.compiler.is_compiling()
        ):  # which cannot follow this: the half layer then does what its original does
            self.__class__ = original
        self.dtype = torch.float16 if keys.dtype == torch.float16 and not autocast.active() else torch.float32
        for name in ("keys", "values"):
            held = getattr(self, name, None)
            if isinstance(held, HalfWeight):
                setattr(self, name, held.stored if self.dtype == torch.float16 else held.upcast())
        full: tuple[Tensor, Tensor] = original.update(self, keys, values, *settings[0], **settings[1])
        return full


def _storable(states: Tensor) -> bool:
    if transforms.active() or autocast.enabled():  # under which a cache is of what dtype it may be
        return False
    plain = type(states) is Tensor and states.dtype == torch.float32 and states.dim() == 4 and states.is_cpu
    return plain and not (torch.is_grad_enabled() and states.requires_grad)


def _half(states: Tensor, limit: float) -> Tensor | None:
    """Return ``states`` in float16, or None if a finite value does not fit, or a position is beyond the limit."""
    half = states.half()
    return None if bool((half.isinf() & states.isfinite()).any()) or reference.beyond(states, limit) else half


def _keep_wide(layer: Any, how: str) -> None:
    """Have the layer, and what takes its place in later caches of its model, be float32; the first time say so."""
    _beyond.add(layer)
    wide, key = _homes.get(layer, (set(), ("", -1)))  # a cache made without a config adds its layers itself
    if key in wide:
        return
    wide.add(key)
    part, index = key
    which = "a layer" if index < 0 else f"layer {index}{part and f' ({part})'}"
    messages.say(f"the KV cache of {which} {how} float32: {WHY_FLOAT32}")


class _Growing(_HalfLayer):
    """DynamicLayer: buffers with room, so that a token costs its own rows and not a copy of all."""

    def _store(self, keys: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor] | None:
        before: int = self.get_seq_length()
        after = before + keys.shape[2]
        buffers = self._room(keys, values, before, after)
        for buffer, new, limit in ((buffers.keys, keys, KEY_LIMIT), (buffers.values, values, VALUE_LIMIT)):
            if not kernels.active().kv_append(buffer, new, before, limit):
                return None
        self.advance(after)
        self.dtype, self.device, self.is_initialized = torch.float32, keys.device, True
        return (keys, values) if before == 0 else (self.keys, self.values)

    def reserve(self, count: int) -> tuple[Tensor, Tensor, int] | None:
        """Return float16 keys and values (B, H, S, D) with room for more rows, and how many they hold; or None."""
        known: RowBuffers | None = self.__dict__.get("_buffers")
        if known is not None and 0 < known.rows <= known.room - count:
            pending = self._pending_rows()
            if known.handed_out(self.keys, self.values) if pending is None else pending == known.rows:
                return known.keys, known.values, known.rows
        if not isinstance(self.keys, HalfWeight) or not isinstance(self.values, HalfWeight):
            return None
        rows = self.keys.shape[2]
        if not rows:
            return None
        buffers = self._room(self.keys, self.values, rows, rows + count)
        return buffers.keys, buffers.values, rows

    def advance(self, rows: int) -> None:
        """Say that the buffers hold ``rows`` rows now; they become ``keys`` and ``values`` when somebody asks."""
        state = self.__dict__
        buffers: RowBuffers = state["_buffers"]
        buffers.rows, buffers.handed, state["_pending"] = rows, None, rows
        state.pop("keys", None)
        state.pop("values", None)

    def __getattr__(self, name: str) -> Any:
        """Hand out the rows that the buffers hold."""
        if name not in ("keys", "values") or "_pending" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._settled()[name]

    def get_seq_length(self, *args: Any) -> int:
        """Return how many positions it holds."""
        rows = self._pending_rows()
        return self.original.get_seq_length(self, *args) if rows is None else rows

    def _pending_rows(self) -> int | None:
        """Return how many rows the buffers hold that nobody has asked for; None if keys and values are in place."""
        state = self.__dict__
        rows: int | None = state.get("_pending")
        if rows is not None and ("keys" in state or "values" in state):  # somebody assigned one of them
            self._settled()
            return None
        return rows

    def _settled(self) -> dict[str, Any]:
        state = self.__dict__
        rows = state.get("_pending")
        if rows is not None:
            keys, values = state["_buffers"].hand_out(rows)
            state.setdefault("keys", keys)
            state.setdefault("values", values)
            state.pop("_pending", None)  # last: another thread may ask meanwhile
        return state

    def _room(self, keys: Tensor, values: Tensor, before: int, after: int) -> RowBuffers:
        """Return buffers that hold the first ``before`` rows and have room for ``after``."""
        buffers: RowBuffers | None = self._settled().get("_buffers")
        if buffers is not None and before and buffers.fit(self.keys, self.values, before, after):
            return buffers
        room = after + max(_ROOM, after // 2) if before else after + _ROOM
        made = []
        for new, held in ((keys, self.__dict__.get("keys")), (values, self.__dict__.get("values"))):
            with torch.inference_mode(False):  # what is born there could not be written to outside of it
                buffer = torch.empty((*new.shape[:2], room, new.shape[3]), dtype=torch.float16, device="cpu")
            if before and held is not None:
                buffer[:, :, :before] = held.stored if isinstance(held, HalfWeight) else held
            made.append(buffer)
        self._buffers = RowBuffers(made[0], made[1], before)
        return self._buffers


class _Sliding(_HalfLayer):
    """DynamicSlidingWindowLayer: the window is kept in float16; its rows are returned in float32, with the new ones."""

    def _store(self, keys: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor] | None:
        if _half(keys, KEY_LIMIT) is None or _half(values, VALUE_LIMIT) is None:
            return None
        full: tuple[Tensor, Tensor] = self.original.update(self, keys, values, *settings[0], **settings[1])
        self.keys, self.values = hand_out(self.keys.half()), hand_out(self.values.half())
        return full


class _Static(_HalfLayer):
    """StaticLayer: allocated once in float16."""

    def _store(self, keys: Tensor, values: Tensor, settings: Settings) -> tuple[Tensor, Tensor] | None:
        halves = _half(keys, KEY_LIMIT), _half(values, VALUE_LIMIT)
        if halves[0] is None or halves[1] is None:
            return None
        if not self.is_initialized:
            takes = len(inspect.signature(self.original.lazy_initialization).parameters) - 1
            with torch.inference_mode(False):  # what is born there could not be written to outside of it
                self.lazy_initialization(*halves[:takes])  # type: ignore[attr-defined]  # before 5 the keys alone
            self.dtype, self.keys, self.values = torch.float32, hand_out(self.keys), hand_out(self.values)
        held = self.keys, self.values
        try:  # its own code knows where the rows go, which versions know in different ways
            self.keys, self.values = (each.stored for each in held)
            self.original.update(self, *halves, *settings[0], **settings[1])
        finally:
            self.keys, self.values = held
        return held

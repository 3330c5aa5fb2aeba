"""What the loaders of Transformers and Diffusers share: when they are ours, and how a tensor of a checkpoint arrives.

A loader that is ours builds its model for float32, so that buffers and everything computed at construction have
float32's digits, and is handed float16 where a weight belongs: the mapped tensor itself if the checkpoint is float16,
else one rounded tensor at a time.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from upcast.checkpoint import overwriting, reading
from upcast.core import config, messages, scopes
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import plain, to_float32
from upcast.core.pages import Memory, give_back_pages
from upcast.core.pattern import matches
from upcast.core.tensor_ref import TensorRef
from upcast.core.torch_modes import float32_by_default, outside_inference_mode
from upcast.integrations import stepping_aside
from upcast.integrations.stepping_aside import NotOurs
from upcast.kernels.rounding import Rounding, to_half
from upcast.patching import engine
from upcast.patching.plan import CONVERT, WRAP, decide
from upcast.policy import policy as policies
from upcast.policy.policy import Choice
from upcast.tensor.packed_weight import PackedWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Loading:
    """One call of ``from_pretrained``.

    Attributes:
        kv_cache, policy, keep, trainable: as for `upcast.patch`.
        strict: called by `upcast.from_pretrained`: what is not ours is an error, not a line.
        divided: between ranks, of which none can step aside alone.
        lost: address of a rounded tensor -> its dtype before, and what rounding lost.
        memory: where rounded tensors go that the model will hold; None: each has memory of its own.
    """

    kv_cache: str | None = None
    policy: Choice = "safe"
    keep: Sequence[str] = ()
    trainable: Sequence[str] = ()
    strict: bool = False
    divided: bool = False
    lost: dict[int, tuple[torch.dtype, Rounding]] = field(default_factory=dict)
    memory: Memory | None = field(default_factory=Memory, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def again(self) -> "Loading":
        """Return the same request for the next model of several."""
        return Loading(self.kv_cache, self.policy, self.keep, self.trainable, self.strict)

    def follow(self, other: "Loading") -> None:
        """Take over what a checkpoint says of itself, in place of what the environment says of all models."""
        self.kv_cache, self.policy, self.strict = other.kv_cache, other.policy, True
        self.keep, self.trainable = other.keep, other.trainable

    @property
    def storage(self) -> str:
        """How weights are to be stored."""
        return policies.resolve(self.policy).storage

    def exact(self, name: str) -> bool:
        """Whether the model's tensor of this name is to keep all its digits."""
        return any(matches(name, pattern) for pattern in (*self.keep, *self.trainable))

    def arrive(
        self, name: str, tensor: Tensor, ours: bool = True, in_place: bool = True, exact: bool = False
    ) -> Tensor:
        """Return a checkpoint's tensor as the float32 model should hold it: float16 if it is a weight that fits.

        ``ours``: nobody else reads the tensor, and its mapped pages may go once it is copied. ``in_place``: the model
        will hold this very tensor, and not something that is put together from several. ``exact``: in float32.
        """
        if not tensor.is_floating_point():
            return tensor
        if isinstance(tensor, PackedWeight):
            return _packed(tensor, in_place, exact)
        if exact or self.storage == "float32":
            return to_float32(tensor)
        with self._turn:  # Transformers loads with several threads: that many tensors would be in memory at once
            return self._arrived(name, tensor, ours, in_place)

    def _arrived(self, name: str, tensor: Tensor, ours: bool, in_place: bool) -> Tensor:
        action, _ = decide(TensorRef(name, tensor, True, []), (), False)
        if action == CONVERT and reading.will_be_packed(tensor, self.storage):
            return plain(tensor)
        if action == CONVERT:
            half, rounding = to_half(tensor, self.memory if in_place else None)  # a block holds what stays
            if ours:
                give_back_pages(tensor)
            if rounding.fits:
                self.lost[half.data_ptr()] = (tensor.dtype, rounding)
                return half
        if action != WRAP:
            return to_float32(tensor)
        if tensor.is_contiguous() and (in_place or not ours):
            return plain(tensor)
        # A rank's columns, or a part of something: mapped, they would hold pages that nobody reads again.
        part = tensor.clone(memory_format=torch.contiguous_format)
        if ours:
            give_back_pages(tensor)
        return part

    def check(self, model: nn.Module) -> None:
        """Raise what `adopt` would, before the weights of ``model`` are read."""
        keep, trainable = (self.keep, self.trainable) if self.strict else patterns(model, quietly=True)
        engine.check(model, self.policy, keep, trainable)

    def adopt(self, model: nn.Module) -> None:
        """Patch the loaded model, unless that was done while it was loaded."""
        if engine.is_patched(model):
            return
        known = {
            name: self.lost[parameter.data_ptr()]
            for name, parameter in model.named_parameters()
            if not isinstance(parameter, PackedWeight) and parameter.data_ptr() in self.lost
        }
        if not self.strict:
            self.keep, self.trainable = patterns(model)
        how = {"policy": self.policy, "keep": self.keep, "trainable": self.trainable}
        adopt(model, known, self.kv_cache, **how, asked=self.strict)


def _packed(weight: PackedWeight, in_place: bool, exact: bool) -> Tensor:
    """Return a weight that its file holds packed: as it is, where it goes into the model whole."""
    if exact:
        return weight.upcast()
    return weight if in_place and weight.region is None else weight.memory().contiguous()


def of_packed_files(policy: Choice) -> Choice:
    """Return the policy for weights that are packed in their files: they stay so, unless the caller says otherwise."""
    if isinstance(policy, policies.Stored) or policies.resolve(policy).storage != "float16":
        return policy
    return cast("Choice", policies.stored(policy, "packed"))


def policy_for(weights: Mapping[str, Tensor], policy: Choice) -> Choice:
    """Return the policy for these mapped weights, which may be packed in their file."""
    packed = any(isinstance(tensor, PackedWeight) for tensor in weights.values())
    return of_packed_files(policy) if packed else policy


def patterns(model: nn.Module, quietly: bool = False) -> tuple[Sequence[str], Sequence[str]]:
    """Return what the environment keeps in float32 and trains of ``model``; say which pattern names nothing of it.

    A program may load several models, and a pattern be meant for one of them.
    """
    settings, names = config.read(), [name for name, _ in model.named_parameters()]
    for variable, given in (("UPCAST_KEEP", settings.keep), ("UPCAST_TRAINABLE", settings.trainable)):
        for pattern in given:
            if not quietly and not _names_one(pattern, names):
                messages.warn(f"{variable}: {pattern!r} matches no parameter of {type(model).__name__}")
    keep, trainable = (
        [pattern for pattern in given if _names_one(pattern, names)] for given in (settings.keep, settings.trainable)
    )
    return keep, trainable


def _names_one(pattern: str, names: Sequence[str]) -> bool:
    return any(matches(name, pattern) for name in names)


_turn = threading.RLock()
_local = threading.local()  # .request: upcast.from_pretrained is at work; .loading: a loader is inside our hook


def current() -> Loading | None:
    """Return what the loader that runs in this thread is to give, or None if it is not ours."""
    loading: Loading | None = getattr(_local, "loading", None)
    return loading


def not_ours() -> AbstractContextManager[None]:
    """Within the block, what the library loads is its own."""
    return scopes.attribute(_local, "loading", None)


def hook(load: Callable[[Callable[..., Any], Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a wrapper of ``from_pretrained`` around ``load(wrapped, args, kwargs)``, which may raise NotOurs."""

    def from_pretrained(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
        if current() is not None:  # the library, or the model, loads another one on the way
            with not_ours():
                return wrapped(*args, **kwargs)
        name = getattr(owner, "__name__", type(owner).__name__)
        request: Loading | None = getattr(_local, "request", None)
        if request is not None:
            return _strictly(name, request.again(), functools.partial(load, wrapped, args, kwargs))
        loading = Loading()

        def ours() -> Any:
            _ask_environment(loading)
            return _loaded(loading, functools.partial(load, wrapped, args, kwargs))

        return stepping_aside.attempt(name, ours, lambda: wrapped(*args, **kwargs), lambda: loading.divided)

    return from_pretrained


def _ask_environment(loading: Loading) -> None:
    stepping_aside.check_enabled()
    settings = config.read()
    loading.kv_cache, loading.policy = settings.kv_cache, policies.of(settings)
    loading.keep, loading.trainable = settings.keep, settings.trainable


def _strictly(name: str, loading: Loading, load: Callable[[], Any]) -> Any:
    try:
        return _loaded(loading, load)
    except NotOurs as reason:
        why = str(reason) or "an UpcastConfig beside its own arguments"
    raise UpcastError(f"{name}.from_pretrained with {why}; upcast stores float16 on the CPU. Leave it out.")


@contextmanager
def begun(loading: Loading) -> Iterator[None]:
    """Within the block, loaders give what ``loading`` says, made of ordinary tensors whatever modes are on.

    One load at a time: while it builds a model, Transformers exchanges functions of torch and its own for all threads,
    and what another load finds and puts back may be the exchanged ones.
    """
    with _turn, outside_inference_mode(), float32_by_default(), scopes.attribute(_local, "loading", loading):
        yield


def _loaded(loading: Loading, load: Callable[[], Any]) -> Any:
    """Return what ``load`` gives, its model patched."""
    with begun(loading):
        result = load()
        model = result[0] if isinstance(result, tuple) else result  # (model, info) with output_loading_info=True
        loading.adopt(model)
    return result


def without_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return ``kwargs`` without what the caller said about dtypes, once it is known to be one that we can honour."""
    for name in ("dtype", "torch_dtype"):
        given = kwargs.get(name)
        wanted = getattr(torch, given, given) if isinstance(given, str) else given
        if wanted not in (None, "auto", *DTYPES):
            raise NotOurs(f"{name}={given!r}")
    return {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Raise NotOurs for arguments that ask for something else than a model on the CPU."""
    given = kwargs.get("quantization_config")
    if given is not None:  # our own comes by Transformers' way: see `transformers.quantizer`
        method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        raise NotOurs("" if method == "upcast" else "a quantization_config")
    devices = kwargs.get("device_map")
    places = devices.values() if isinstance(devices, dict) else [devices]
    for place in places:
        if place is None or (isinstance(place, str) and place in _AUTOMATIC and not torch.accelerator.is_available()):
            continue
        if str(place).split(":", maxsplit=1)[0] != "cpu":
            raise NotOurs(f"device_map={devices!r}")


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def requested(request: Loading) -> AbstractContextManager[None]:
    """Within the block, loaders do what ``request`` says, and not the environment."""
    return scopes.attribute(_local, "request", request)


def adopt(root: nn.Module, known: reading.Known, kv_cache: str | None, **how: Any) -> None:
    """Patch a model whose tensors come from files; those that stay mapped are safe from what happens to the files.

    ``how``: as for `upcast.patching.engine.adopt`.
    """
    overwriting.hold(root)
    engine.adopt(root, known, kv_cache, **how)

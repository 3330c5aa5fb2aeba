"""What the loaders of Transformers and Diffusers share: when they are ours, and how a tensor of a checkpoint arrives.

A loader that is ours builds its model for float32, so that buffers and everything computed at construction have
float32's digits, and is handed float16 where a weight belongs: the mapped tensor itself if the checkpoint is float16,
else one rounded tensor at a time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from upcast import checkpoint, config, console, patching
from upcast import policy as policies
from upcast.errors import UpcastError
from upcast.half_weight import HalfWeight
from upcast.huge_pages import Memory
from upcast.integrations import litgpt_fused
from upcast.planning import CONVERT, decide
from upcast.rounding import Rounding, to_half
from upcast.slot import Slot

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class NotOurs(Exception):
    """A call that upcast leaves to the library, and why."""


@dataclass
class Loading:
    """One call of ``from_pretrained``.

    Attributes:
        kv_cache, policy: as for `upcast.patch`.
        strict: called by `upcast.from_pretrained`: what is not ours is an error, not a line.
        lost: address of a rounded tensor -> its dtype before, and what rounding lost.
        memory: where rounded tensors go that the model will hold; None: each has memory of its own.
    """

    kv_cache: str | None = None
    policy: patching.Choice = "safe"
    strict: bool = False
    lost: dict[int, tuple[torch.dtype, Rounding]] = field(default_factory=dict)
    memory: Memory | None = field(default_factory=Memory, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def arrive(self, name: str, tensor: Tensor, ours: bool = True, in_place: bool = True) -> Tensor:
        """Return a checkpoint's tensor as the float32 model should hold it: float16 if it is a weight that fits.

        ``ours``: nobody else reads the tensor, and its mapped pages may go once it is copied. ``in_place``: the model
        will hold this very tensor, and not something that is put together from several.
        """
        if not tensor.is_floating_point():
            return tensor
        with self._turn:  # Transformers loads with several threads: that many tensors would be in memory at once
            return self._arrived(name, tensor, ours, in_place)

    def _arrived(self, name: str, tensor: Tensor, ours: bool, in_place: bool) -> Tensor:
        action, _ = decide(Slot(name, tensor, True, []), (), False)
        if action == CONVERT:
            half, rounding = to_half(tensor, self.memory if in_place else None)  # a block holds what stays
            if ours:
                checkpoint.give_back_pages(tensor)
            if rounding.fits:
                self.lost[half.data_ptr()] = (tensor.dtype, rounding)
                return half
        if tensor.dtype != torch.float16 or tensor.dim() < 2:
            return tensor.float()
        if tensor.is_contiguous() and (in_place or not ours):
            return tensor
        # A rank's columns, or a part of something: mapped, they would hold pages that nobody reads again.
        part = tensor.clone(memory_format=torch.contiguous_format)
        if ours:
            checkpoint.give_back_pages(tensor)
        return part

    def adopt(self, model: nn.Module) -> None:
        """Patch the loaded model."""
        known = {
            name: self.lost[parameter.data_ptr()]
            for name, parameter in model.named_parameters()
            if parameter.data_ptr() in self.lost
        }
        patching.adopt(model, known, self.kv_cache, self.policy)


_local = threading.local()  # .request: upcast.from_pretrained is at work; .loading: a loader is inside our hook


def current() -> Loading | None:
    """Return what the loader that runs in this thread is to give, or None if it is not ours."""
    loading: Loading | None = getattr(_local, "loading", None)
    return loading


def hook(load: Callable[[Callable[..., Any], Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a wrapper of ``from_pretrained`` around ``load(wrapped, args, kwargs)``, which may raise NotOurs."""

    def from_pretrained(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
        request: Loading | None = getattr(_local, "request", None)
        if current() is not None or (request is None and not config.read().enabled):
            return wrapped(*args, **kwargs)
        if request is None:
            settings = config.read()
            loading = Loading(settings.kv_cache, settings.policy)
        else:
            loading = Loading(request.kv_cache, request.policy, request.strict)
        _local.loading = loading
        try:
            result = load(wrapped, args, kwargs)
            _adopt(result, loading)
            return result
        except NotOurs as reason:
            why = str(reason)
        finally:
            _local.loading = None
        name = getattr(owner, "__name__", type(owner).__name__)
        if loading.strict:
            raise UpcastError(f"{name}.from_pretrained with {why}; upcast stores float16 on the CPU. Leave it out.")
        console.say(f"{name} runs as it is, unpatched: {why}")
        return wrapped(*args, **kwargs)

    return from_pretrained


def _adopt(result: Any, loading: Loading) -> None:
    model = result[0] if isinstance(result, tuple) else result  # (model, info) with output_loading_info=True
    try:
        loading.adopt(model)
    except UpcastError as error:
        if loading.strict:
            raise
        console.say(f"{type(model).__name__} runs as it is, unpatched: {error}")


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
    if kwargs.get("quantization_config") is not None:
        raise NotOurs("a quantization_config")
    devices = kwargs.get("device_map")
    places = devices.values() if isinstance(devices, dict) else [devices]
    for place in places:
        if place is None or (isinstance(place, str) and place in _AUTOMATIC and not torch.accelerator.is_available()):
            continue
        if str(place).split(":", maxsplit=1)[0] != "cpu":
            raise NotOurs(f"device_map={devices!r}")


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@contextmanager
def _requested(kv_cache: str | None, policy: patching.Choice) -> Iterator[None]:
    _local.request = Loading(kv_cache, policy, strict=True)
    try:
        yield
    finally:
        _local.request = None


def from_pretrained(
    model_class: Any, *args: Any, kv_cache: str | None = None, policy: patching.Choice = "safe", **kwargs: Any
) -> Any:
    """Return ``model_class.from_pretrained(*args, **kwargs)``, patched, without a float32 copy on the way.

    A float16 checkpoint is mapped into memory and used as it is; bfloat16 and float32 ones are rounded tensor by
    tensor, so that the peak is float16's size plus the largest tensors. The files must stay as they are while the model
    lives. ``dtype`` may be float16, bfloat16, float32 or "auto": the model says float32 and is stored in float16.

    Args:
        model_class: a model or Auto class of Transformers, a model or pipeline class of Diffusers.
        args, kwargs: as for its ``from_pretrained``.
        kv_cache, policy: as for `upcast.patch`.

    Raises:
        UpcastError: the class has no loader that upcast knows, the arguments ask for another device, for quantization
            or for another dtype, or kv_cache or policy is unknown.
    """
    policies.resolve(policy)
    if kv_cache is not None:
        litgpt_fused.check(kv_cache)
    library = next((c.__module__.split(".")[0] for c in getattr(model_class, "__mro__", ()) if _known(c)), None)
    if library is None:
        raise UpcastError(
            f"{getattr(model_class, '__name__', model_class)!r}; from_pretrained takes a class of Transformers or "
            "Diffusers. For other models, load them and call upcast.patch(model)."
        )
    if library == "transformers":
        from upcast.integrations import transformers as ours
    else:
        from upcast.integrations import diffusers as ours  # type: ignore[no-redef]

        _also_transformers()
    ours.install()
    with _requested(kv_cache, policy):
        result = model_class.from_pretrained(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if isinstance(model, nn.Module) and not any(isinstance(p, HalfWeight) for p in model.parameters()):
        patching.patch(model, policy=policy, kv_cache=kv_cache)
    return result


def _known(candidate: Any) -> bool:
    library = candidate.__module__.split(".")[0]
    return library in ("transformers", "diffusers") and hasattr(candidate, "from_pretrained")


def _also_transformers() -> None:
    """Pipelines of Diffusers load text encoders of Transformers."""
    try:
        from upcast.integrations import transformers

        transformers.install()
    except ImportError:
        return

"""LitGPT's command line under UPCAST=1: chat and the generate scripts, each with the same few names replaced.

The scripts build a model, load it with ``load_checkpoint`` (the adapters with ``lazy_load`` and ``load_state_dict``),
and hand it to Fabric. Each script's own name for these is wrapped, not LitGPT's: finetuning loads with the same
functions and has wrappers of its own (`upcast.integrations.litgpt.finetune`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from upcast.core import config
from upcast.core.forward_override import Attached
from upcast.integrations import loading, stepping_aside
from upcast.integrations.litgpt import load, packed_folders
from upcast.integrations.stepping_aside import NotOurs
from upcast.patching import engine
from upcast.patching.discovery import unwrap
from upcast.policy import policy as policies
from upcast.tensor.packed_weight import PackedWeight

SPLIT = "it splits the model over devices"


def activate(module: ModuleType) -> None:
    """Make ``load_checkpoint``, as ``module`` knows it, give patched models."""
    stepping_aside.wrap(module, {"load_checkpoint": _load_checkpoint, **packed_folders.finders(module)})


def activate_adapter(module: ModuleType) -> None:
    """Make the GPT that ``module`` builds patch itself when it takes its weights, in float32 unless asked otherwise."""
    loaders = {"get_default_supported_precision": default_precision, "lazy_load": _lazy_load, "GPT": _build}
    stepping_aside.wrap(module, {**loaders, **packed_folders.finders(module)})


def activate_unpatched(module: ModuleType) -> None:
    """Have ``main`` of ``module`` say that it runs as it is."""
    stepping_aside.wrap(module, {"main": _main})


# --- load_checkpoint --------------------------------------------------------------------------------------------------


def _load_checkpoint(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    return load_or_step_aside(wrapped, args, kwargs, _take_over)


def load_or_step_aside(
    wrapped: Callable[..., Any], args: Any, kwargs: Any, ours: Callable[[dict[str, Any]], None]
) -> Any:
    """Call ``ours`` with the arguments of LitGPT's ``load_checkpoint``; have LitGPT load where it refuses or fails."""

    def attempt() -> None:
        stepping_aside.check_enabled()
        call = load.arguments(wrapped, args, kwargs)
        reason = not_ours(call["fabric"])
        if reason:
            raise NotOurs(reason)
        with stepping_aside.undone_if_it_fails(unwrap(call["model"])):
            ours(call)

    path = kwargs.get("checkpoint_path") or next((arg for arg in args if isinstance(arg, Path)), wrapped.__name__)
    file = packed_folders.file_of(path) if isinstance(path, Path) else None
    return packed_folders.attempt(file, str(path), attempt, lambda: wrapped(*args, **kwargs), verb="is loaded")


def _take_over(call: dict[str, Any]) -> None:
    model, path = unwrap(call["model"]), packed_folders.file_of(Path(call["checkpoint_path"]))
    check(model, policies.of(config.read()))
    _fill(model, load.read_for(model, path))
    _compute_in_float32(call["fabric"])


def not_ours(fabric: Any) -> str:
    """Return why what this Fabric loads is not for upcast, or an empty string."""
    from lightning.fabric.plugins.precision import HalfPrecision, MixedPrecision, Precision
    from lightning.fabric.strategies import SingleDeviceStrategy

    if fabric.device.type != "cpu":
        return f"it goes to {fabric.device.type!r}, not to the CPU"
    if not isinstance(fabric.strategy, SingleDeviceStrategy):
        return SPLIT
    precision = fabric.strategy.precision
    if type(precision) in (Precision, HalfPrecision):
        return ""
    mixed = isinstance(precision, MixedPrecision)
    return f"precision={precision.precision!r}" if mixed else f"the weights are for {type(precision).__name__}"


def check(model: Any, policy: str) -> None:
    """Raise what patching ``model`` as the environment asks would, before its weights are read."""
    keep, trainable = loading.patterns(model, quietly=True)
    engine.check(model, policy, keep, trainable)


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    settings, (keep, trainable) = config.read(), loading.patterns(model)
    policy = loading.policy_for(weights, policies.of(settings))
    load.fill(model, weights, settings.kv_cache, policy, keep=keep, trainable=trainable)
    cache = model.transformer.h[0].attn.kv_cache
    if cache is not None:  # made before the model was patched, in another dtype
        model.set_kv_cache(batch_size=len(cache.k), max_seq_length=model.max_seq_length)


def _compute_in_float32(fabric: Any) -> None:
    """Stop Fabric from turning modules and what they compute into the half precision it was made for."""
    from lightning.fabric.plugins.precision import Precision

    fabric.strategy.precision = fabric._precision = Precision()


# --- adapters ---------------------------------------------------------------------------------------------------------


def default_precision(wrapped: Callable[..., str], _: Any, args: Any, kwargs: Any) -> str:
    ours = stepping_aside.enabled() and load.accelerator("auto") == "cpu"
    return "32-true" if ours else wrapped(*args, **kwargs)


def _lazy_load(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    path = Path(str(args[0] if args else kwargs.get("filename")))
    try:
        return packed_folders.read(path)
    except Exception:  # for LitGPT to load, or to say what is wrong, unless there is nothing of its own
        if packed_folders.file_of(path) != path:
            raise
        return wrapped(*args, **kwargs)


def _build(wrapped: Callable[..., nn.Module], _: Any, args: Any, kwargs: Any) -> nn.Module:
    model = wrapped(*args, **kwargs)
    if not stepping_aside.enabled():
        return model
    found = {(p.device.type, str(p.dtype).removeprefix("torch.")) for p in model.parameters()}
    if found == {("cpu", "float32")}:
        model.__dict__["load_state_dict"] = Taking(model)
    else:
        asked = ", ".join(f"{dtype} on {device!r}" for device, dtype in sorted(found))
        stepping_aside.say(f"{type(model).__module__}.GPT runs as it is, unpatched: it was asked for in {asked}")
    return model


class Taking(Attached):
    """``load_state_dict`` of a model of the adapter scripts."""

    def __call__(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take over mapped weights, once."""
        model = self.module
        del model.__dict__["load_state_dict"]

        def ours() -> Any:
            if not all(type(value) in (Tensor, nn.Parameter, PackedWeight) for value in state.values()):
                raise NotOurs
            with stepping_aside.undone_if_it_fails(model):
                return _fill(model, dict(state))

        name = f"{type(model).__module__}.GPT"
        return stepping_aside.attempt(name, ours, lambda: model.load_state_dict(state, *args, **kwargs))


# --- what splits the model --------------------------------------------------------------------------------------------


def _main(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    if stepping_aside.enabled():
        stepping_aside.say(f"{wrapped.__module__} runs as it is, unpatched: {SPLIT}")
    return wrapped(*args, **kwargs)

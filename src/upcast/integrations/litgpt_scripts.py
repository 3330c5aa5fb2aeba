"""LitGPT's command line under UPCAST=1: chat and the generate scripts, each with the same few names replaced.

The scripts build a model, load it with ``load_checkpoint`` (the adapters with ``lazy_load`` and ``load_state_dict``),
and hand it to Fabric. Each script's own name for these is wrapped, not LitGPT's: finetuning loads with the same
functions and has wrappers of its own (`upcast.integrations.litgpt_finetune`).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from torch import Tensor, nn

from upcast import checkpoint, config, console
from upcast.errors import UpcastError
from upcast.forward import Attached
from upcast.integrations import litgpt
from upcast.targets import unwrap

SPLIT = "it splits the model over devices"


def activate(module: ModuleType) -> None:
    """Make ``load_checkpoint``, as ``module`` knows it, give patched models."""
    wrapt.wrap_function_wrapper(module, "load_checkpoint", _load_checkpoint)


def activate_adapter(module: ModuleType) -> None:
    """Make the GPT that ``module`` builds patch itself when it takes its weights, in float32 unless asked otherwise."""
    wrapt.wrap_function_wrapper(module, "get_default_supported_precision", default_precision)
    wrapt.wrap_function_wrapper(module, "lazy_load", _lazy_load)
    wrapt.wrap_function_wrapper(module, "GPT", _build)


def activate_unpatched(module: ModuleType) -> None:
    """Have ``main`` of ``module`` say that it runs as it is."""
    wrapt.wrap_function_wrapper(module, "main", _main)


# --- load_checkpoint --------------------------------------------------------------------------------------------------


def _load_checkpoint(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    call = litgpt.arguments(wrapped, args, kwargs)
    fabric, path = call["fabric"], Path(call["checkpoint_path"])
    model = unwrap(call["model"])
    weights = read_unless(not_ours(fabric), path, lambda: litgpt.read_for(model, path))
    if weights is None:
        return wrapped(*args, **kwargs)
    _fill(model, weights)
    _compute_in_float32(fabric)
    return None


def read_unless(reason: str, path: Path, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Return the weights; None, with one line that says why, where LitGPT is to load ``path`` itself."""
    if not reason:
        try:
            return read()
        except UpcastError as error:  # then it is for LitGPT to load it, or to say what is wrong
            reason = str(error)
    console.say(f"{path} is loaded as it is, unpatched: {reason}")
    return None


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


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    settings = config.read()
    litgpt.fill(model, weights, settings.kv_cache, settings.policy)
    cache = model.transformer.h[0].attn.kv_cache
    if cache is not None:  # made before the model was patched, in another dtype
        model.set_kv_cache(batch_size=len(cache.k), max_seq_length=model.max_seq_length)


def _compute_in_float32(fabric: Any) -> None:
    """Stop Fabric from turning modules and what they compute into the half precision it was made for."""
    from lightning.fabric.plugins.precision import Precision

    fabric.strategy.precision = fabric._precision = Precision()


# --- adapters ---------------------------------------------------------------------------------------------------------


def default_precision(wrapped: Callable[..., str], _: Any, args: Any, kwargs: Any) -> str:
    return wrapped(*args, **kwargs) if litgpt.accelerator("auto") != "cpu" else "32-true"


def _lazy_load(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    try:
        return checkpoint.read(Path(*args, **kwargs))
    except UpcastError:  # for LitGPT to load, or to say what is wrong
        return wrapped(*args, **kwargs)


def _build(wrapped: Callable[..., nn.Module], _: Any, args: Any, kwargs: Any) -> nn.Module:
    model = wrapped(*args, **kwargs)
    found = {(p.device.type, str(p.dtype).removeprefix("torch.")) for p in model.parameters()}
    if found == {("cpu", "float32")}:
        model.__dict__["load_state_dict"] = Taking(model)
    else:
        asked = ", ".join(f"{dtype} on {device!r}" for device, dtype in sorted(found))
        console.say(f"{type(model).__module__}.GPT runs as it is, unpatched: it was asked for in {asked}")
    return model


class Taking(Attached):
    """``load_state_dict`` of a model of the adapter scripts."""

    def __call__(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take over mapped weights, once."""
        model = self.module
        del model.__dict__["load_state_dict"]
        if not all(type(value) in (Tensor, nn.Parameter) for value in state.values()):
            return model.load_state_dict(state, *args, **kwargs)
        return _fill(model, dict(state))


# --- what splits the model --------------------------------------------------------------------------------------------


def _main(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    console.say(f"{wrapped.__module__} runs as it is, unpatched: {SPLIT}")
    return wrapped(*args, **kwargs)

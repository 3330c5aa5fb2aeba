"""LitGPT's finetuning under UPCAST=1: the frozen base goes to float16, adapters stay the parameters that they are.

The scripts build a model, mark what learns, make an optimizer, and only then load the checkpoint. The load is where
the base is patched: what learns takes its numbers in place, since the optimizer holds it already.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from upcast.checkpoint import reading
from upcast.core import config, pages
from upcast.core.errors import UpcastError
from upcast.integrations import loading, stepping_aside
from upcast.integrations.litgpt import load, packed_folders, scripts
from upcast.integrations.stepping_aside import NotOurs
from upcast.patching.discovery import unwrap
from upcast.policy import policy as policies


def activate(module: ModuleType) -> None:
    """Make ``module`` load its checkpoint into float16 and compute in float32, unless asked for another precision."""
    wrappers = {
        "get_default_supported_precision": scripts.default_precision,
        "instantiate_torch_optimizer": _optimizer,
        "load_checkpoint": _load_checkpoint,
    }
    if hasattr(module, "load_checkpoint_update"):
        wrappers["load_checkpoint_update"] = _load_checkpoint
    stepping_aside.wrap(module, {**wrappers, **packed_folders.finders(module)})


def _optimizer(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    """Make the optimizer from what learns: LitGPT hands over the base as well, which it would keep in memory."""
    if not stepping_aside.enabled():
        return wrapped(*args, **kwargs)
    call = load.arguments(wrapped, args, kwargs)
    parameters = call["model_parameters"] = list(call["model_parameters"])  # a generator can be read once
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    return wrapped(call["optimizer"], learning or parameters, **call["kwargs"])


def _load_checkpoint(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    return scripts.load_or_step_aside(wrapped, args, kwargs, _take_over)


def _take_over(call: dict[str, Any]) -> None:
    model, path = unwrap(call["model"]), Path(call["checkpoint_path"])
    reason = _not_float32(model)
    if reason:
        raise NotOurs(reason)
    scripts.check(model, policies.of(config.read()))
    _fill(model, _read(model, path, call.get("adapter_path")))


def _not_float32(model: nn.Module) -> str:
    """Return why the adapters are not for upcast, or an empty string."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    other = sorted(found - {"float32"})
    return f"the adapters are {', '.join(other)}; they learn in float32 (--precision 32-true)" if other else ""


def _read(model: nn.Module, path: Path, adapter: Path | None) -> dict[str, Tensor]:
    """Return the mapped weights under the model's names; refuse those of another config."""
    weights = packed_folders.read(path)
    if adapter is not None:
        weights.update(reading.read(Path(adapter)))
    expected = model.state_dict()
    weights = {_name(name, expected): tensor for name, tensor in weights.items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    wrong = sorted(name for name in weights if name not in expected or weights[name].shape != expected[name].shape)
    wrong += sorted(frozen - weights.keys())
    if wrong:
        raise UpcastError(
            f"{path} and model_config.yaml do not belong together ({', '.join(wrong[:3])}); every frozen weight comes "
            "from the checkpoint, in its shape. Download or convert the checkpoint again."
        )
    return weights


def _name(name: str, expected: Mapping[str, Tensor]) -> str:
    """Return what an adapter model calls the checkpoint's ``name``: its linear layers are one level deeper."""
    parent, _, last = name.rpartition(".")
    deeper = f"{parent}.linear.{last}"
    return deeper if name not in expected and deeper in expected else name


def _fill(model: Any, weights: dict[str, Tensor]) -> None:
    settings, (keep, trainable) = config.read(), loading.patterns(model)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name in learning.keys() & weights.keys():
            learning[name].copy_(weights.pop(name))
    policy = loading.policy_for(weights, policies.of(settings))
    known = reading.to_float16(weights, pages.Memory(), keep, policies.resolve(policy).storage)
    model.load_state_dict(weights, strict=False, assign=True)
    loading.adopt(model, known, settings.kv_cache, policy=policy, keep=keep, trainable=trainable)

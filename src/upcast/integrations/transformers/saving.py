"""Transformers: a patched model's config.json names the dtype of the tensors beside it, and that it was patched.

``save_pretrained`` writes what ``model.dtype`` says, float32, though the weights that it writes are float16. Read with
that, a folder would give a model of twice the bytes. What the program asked for, the config remembers (see
`transformers.quantizer`); under UPCAST=1 it is what it would be without.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import Tensor

from upcast.core.about import VERSION
from upcast.core.pattern import matches
from upcast.integrations import stepping_aside
from upcast.patching import engine
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.packed_weight import PackedWeight

METHOD = "upcast"


def install(module: ModuleType) -> None:
    """Wrap ``PreTrainedModel.save_pretrained`` of ``transformers.modeling_utils``, once."""
    if not isinstance(inspect.getattr_static(module.PreTrainedModel, "save_pretrained"), wrapt.FunctionWrapper):
        stepping_aside.wrap(module, {"PreTrainedModel.save_pretrained": _save})


def _save(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    if not any(isinstance(parameter, HalfWeight) for parameter in model.parameters()):
        return wrapped(*args, **kwargs)
    dtype = _dtype_of(kwargs.get("state_dict") or model.state_dict(keep_vars=True))
    with _written_as(model.config, dtype, _remembered(model)):
        return wrapped(*args, **kwargs)


def _remembered(model: Any) -> dict[str, Any] | None:
    """Return what config.json says of how ``model`` was patched, or None where the program had not asked for it."""
    record = engine.record_of(model) if engine.is_patched(model) else None
    if record is None or not record.asked:
        return None
    # What has learned since, or is float32 for another reason, would be rounded by the next load.
    wide = [name for name, each in model.named_parameters() if each.dim() >= 2 and not isinstance(each, HalfWeight)]
    also = [name for name in wide if not any(matches(name, pattern) for pattern in record.keep)]
    return saved(str(record.policy), None, [*record.keep, *also])


def saved(policy: str, kv_cache: str | None, keep: Sequence[str]) -> dict[str, Any]:
    """Return the fields of an `upcast.UpcastConfig`, as JSON has them."""
    cache = {} if kv_cache is None else {"kv_cache": kv_cache}
    return {"quant_method": METHOD, "policy": policy, **cache, "keep": list(keep), "upcast_version": VERSION}


def _dtype_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the dtype of 16 bits that holds all numbers, or None: of vectors and what is float32 it may not."""
    packed = any(isinstance(tensor, PackedWeight) and tensor.store.held for tensor in state.values())
    dtype = torch.bfloat16 if packed else torch.float16
    fit = all(_fits(tensor, dtype) for tensor in state.values() if tensor.is_floating_point())
    return str(dtype).removeprefix("torch.") if fit else None


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    if isinstance(tensor, HalfWeight) and tensor.store.held:
        stored = torch.bfloat16 if isinstance(tensor, PackedWeight) else torch.float16
    else:
        stored = tensor.dtype
    return stored == dtype or torch.equal(tensor.to(dtype).float(), tensor.float())


@contextmanager
def _written_as(config: Any, dtype: str | None, patched: dict[str, Any] | None) -> Iterator[None]:
    """Within the block, ``config`` names ``dtype``, for itself and its parts, whenever it is written; and ``patched``.

    None: what it says by itself.
    """

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        del config.__dict__["save_pretrained"]  # or it would be written as well
        with _naming(config, dtype, patched):
            return config.save_pretrained(*args, **kwargs)

    try:
        config.__dict__["save_pretrained"] = save_pretrained
        yield
        config.__dict__.pop("save_pretrained", None)
    except BaseException:
        config.__dict__.pop("save_pretrained", None)
        raise


@contextmanager
def _naming(config: Any, dtype: str | None, patched: dict[str, Any] | None) -> Iterator[None]:
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    named: list[tuple[Any, str, Any]] = [
        (part, name, dtype) for part in parts if part is not None and dtype for name in _names(part)
    ]
    if patched is not None:
        named.append((config, "quantization_config", patched))
    before = [(part.__dict__, name, part.__dict__.get(name, _NOTHING)) for part, name, _ in named]
    try:
        for part, name, value in named:
            part.__dict__[name] = value
        yield
        _name_again(before)
    except BaseException:
        _name_again(before)
        raise


_NOTHING = object()


def _name_again(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    for fields, name, value in before:
        if value is _NOTHING:
            fields.pop(name, None)
        else:
            fields[name] = value


def _names(config: Any) -> list[str]:
    return [name for name in ("dtype", "_dtype", "torch_dtype") if name in config.__dict__]

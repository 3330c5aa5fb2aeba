"""Transformers: a patched model's config.json names the dtype of the tensors beside it.

``save_pretrained`` writes what ``model.dtype`` says, float32, though the weights that it writes are float16. Read with
that, a folder would give a model of twice the bytes.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import Tensor

from upcast.integrations import stepping_aside
from upcast.tensor.half_weight import HalfWeight


def install(module: ModuleType) -> None:
    """Wrap ``PreTrainedModel.save_pretrained`` of ``transformers.modeling_utils``, once."""
    if not isinstance(inspect.getattr_static(module.PreTrainedModel, "save_pretrained"), wrapt.FunctionWrapper):
        stepping_aside.wrap(module, {"PreTrainedModel.save_pretrained": _save})


def _save(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    weights = any(isinstance(parameter, HalfWeight) for parameter in model.parameters())
    if not weights or not _all_fit(kwargs.get("state_dict") or model.state_dict(keep_vars=True)):
        return wrapped(*args, **kwargs)
    with _written_as(model.config, "float16"):
        return wrapped(*args, **kwargs)


def _all_fit(state: Mapping[str, Tensor]) -> bool:
    """Whether float16 holds all numbers: of vectors and of what is kept in float32 it may not."""
    return all(
        torch.equal(tensor.half().float(), tensor.float())
        for tensor in state.values()
        if not _is_half(tensor) and tensor.is_floating_point()
    )


def _is_half(tensor: Tensor) -> bool:
    if isinstance(tensor, HalfWeight):
        return tensor.store.half is not None
    return tensor.dtype == torch.float16


@contextmanager
def _written_as(config: Any, dtype: str) -> Iterator[None]:
    """Within the block, ``config`` names ``dtype``, for itself and its parts, whenever it is written."""

    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        del config.__dict__["save_pretrained"]  # or it would be written as well
        with _naming(config, dtype):
            return config.save_pretrained(*args, **kwargs)

    try:
        config.__dict__["save_pretrained"] = save_pretrained
        yield
        config.__dict__.pop("save_pretrained", None)
    except BaseException:
        config.__dict__.pop("save_pretrained", None)
        raise


@contextmanager
def _naming(config: Any, dtype: str) -> Iterator[None]:
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    before = [(part, name, part.__dict__[name]) for part in parts if part is not None for name in _names(part)]
    try:
        for part, name, _ in before:
            part.__dict__[name] = dtype
        yield
        _name_again(before)
    except BaseException:
        _name_again(before)
        raise


def _name_again(before: list[tuple[Any, str, Any]]) -> None:
    for part, name, value in before:
        part.__dict__[name] = value


def _names(config: Any) -> list[str]:
    return [name for name in ("dtype", "_dtype", "torch_dtype") if name in config.__dict__]

"""LitGPT under UPCAST=1 with a packed folder: what looks for ``lit_model.pth`` there finds ``lit_model.safetensors``.

LitGPT itself cannot read that file, so a call that is not for upcast, or fails, has nobody to be left to: it raises.
"""

import inspect
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor

from upcast.checkpoint import packed_file, reading
from upcast.core.errors import UpcastError
from upcast.integrations import stepping_aside
from upcast.integrations.litgpt import model_config
from upcast.integrations.stepping_aside import NotOurs

Result = TypeVar("Result")
Call = Mapping[str, Any]  # the arguments of one by name


def activate(module: ModuleType) -> None:
    """Have ``module``, which looks for a folder and loads it by ``litgpt.api``, find packed ones."""
    stepping_aside.wrap(module, finders(module))


def finders(module: ModuleType) -> Mapping[str, Callable[..., Any]]:
    """Return wrappers for what ``module`` finds and checks folders with, merges into them, and makes of them."""
    known = {"auto_download_checkpoint": _find, "check_valid_checkpoint_dir": _check, "merge_lora": _merge}
    known["convert_lit_checkpoint"] = _convert
    return {name: wrapper for name, wrapper in known.items() if hasattr(module, name)}


def file_of(path: Path) -> Path:
    """Return the packed file where LitGPT's ``path`` is not there and that one is; else ``path``."""
    return model_config.weights(path.parent) if path.name == model_config.WEIGHTS else path


def read(path: Path) -> dict[str, Tensor]:
    """Return the mapped weights of LitGPT's ``path``, or of the packed file in its place."""
    file = file_of(path)
    return packed_file.read(file) if file.name == model_config.PACKED else reading.read(file)


def weights_of(name: object) -> Path | None:
    """Return the file of the packed folder that LitGPT would call ``name``, a path or a model under ``checkpoints``."""
    for folder in (Path(str(name)), Path("checkpoints", str(name))):
        file = model_config.weights(folder)
        if file.name == model_config.PACKED and os.path.isfile(folder / model_config.CONFIG):
            return file
    return None


def attempt(
    file: Path | None, what: str, ours: Callable[[], Result], theirs: Callable[[], Result], verb: str = "runs"
) -> Result:
    """Return what ``ours`` gives, as `stepping_aside.attempt` does; of a packed ``file`` nobody else gives anything.

    Raises:
        UpcastError: the file is packed, and the call is not for upcast.
    """
    if file is None or file.name != model_config.PACKED:
        return stepping_aside.attempt(what, ours, theirs, verb=verb)
    try:
        return ours()
    except NotOurs as reason:
        if str(reason):
            raise UpcastError(
                f"{file} holds packed weights, which upcast alone reads, and this call is not for upcast: {reason}. "
                "Leave that out, or convert the folder back: "
                f"python -m upcast convert {file.parent} --storage bfloat16."
            ) from None
    return theirs()


def _find(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    """Return a packed folder as LitGPT would an ordinary one; it would look for lit_model.pth, and download it."""
    file = weights_of(args[0] if args else kwargs.get("model_name")) if stepping_aside.enabled() else None
    return file.parent if file else wrapped(*args, **kwargs)


def _check(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    """Have LitGPT check a packed folder for its own file of weights, and for all others that it needs."""
    folder = args[0] if args else kwargs.get("checkpoint_dir")
    theirs = len(args) > 1 or "model_filename" in kwargs or not stepping_aside.enabled()
    if theirs or weights_of(folder) is None:
        return wrapped(*args, **kwargs)
    return wrapped(*args, **kwargs, model_filename=model_config.PACKED)


def _merge(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    """Merge LoRA weights into a packed base by a copy of it in bfloat16, beside the result, gone afterwards."""
    call, file = _packed(_base, wrapped, args, kwargs)
    if file is None:
        return wrapped(*args, **kwargs)
    with _in_bfloat16(file.parent, call["checkpoint_dir"]) as base:
        return wrapped(**{**call, "pretrained_checkpoint_dir": base})


def _convert(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    """Convert a packed folder for Transformers by a copy of it in bfloat16, beside the result, gone afterwards."""
    call, file = _packed(operator.itemgetter("checkpoint_dir"), wrapped, args, kwargs)
    if file is None:
        return wrapped(*args, **kwargs)
    with _in_bfloat16(file.parent, call["output_dir"]) as base:
        return wrapped(**{**call, "checkpoint_dir": base})


def _packed(
    source: Callable[[Call], object], wrapped: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Call, Path | None]:
    """Return a call by the names of its arguments, and the file where its ``source`` is a packed folder."""
    try:
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        return call, weights_of(source(call)) if stepping_aside.enabled() else None
    except Exception:  # for LitGPT to say what is wrong
        return {}, None


@contextmanager
def _in_bfloat16(packed: Path, beside: Path) -> Iterator[Path]:
    """Yield a folder with the numbers of a packed one in bfloat16, which is gone afterwards."""
    from upcast.integrations import convert_packed

    Path(beside).mkdir(parents=True, exist_ok=True)  # as LitGPT does
    with tempfile.TemporaryDirectory(prefix="base-", dir=beside) as place:
        convert_packed.unpack(packed, Path(place, "bfloat16"))
        yield Path(place, "bfloat16")


def _base(call: Call) -> object:
    """Return the folder that LoRA weights belong to, as the call says or what was learned itself."""
    from litgpt.scripts.merge_lora import load_lora_metadata

    return call.get("pretrained_checkpoint_dir") or load_lora_metadata(Path(call["checkpoint_dir"]))[1]

"""Transformers: from_pretrained that gives patched models, under UPCAST=1 and for `upcast.from_pretrained`.

From Transformers 5 on, ``_load_pretrained_model`` takes a state dict whose tensors it materialises one by one, with
``tensor[...]`` and then ``.to(device, dtype)``. Ours are `Arriving`: the tensor that comes out is float16 where it is a
weight. Tensor parallelism (``tp_plan``) takes its part in between, as it would of a safetensors slice, so that a rank
reads no more than that. Older versions load in the checkpoint's dtype, and what came is rounded afterwards.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from upcast.checkpoint import packed_file, reading
from upcast.core import pages
from upcast.core.errors import UpcastError
from upcast.core.memory_layout import plain
from upcast.integrations import checkpoint_files, loading, stepping_aside
from upcast.integrations.loading import Loading
from upcast.integrations.stepping_aside import NotOurs
from upcast.integrations.transformers import saving
from upcast.tensor.packed_weight import PackedWeight


class Arriving:
    """One tensor of a checkpoint, as Transformers handles it before it materialises it."""

    def __init__(self, tensor: Tensor, arrive: Callable[[Tensor], Tensor] | None) -> None:
        self.tensor, self.arrive = tensor, arrive  # arrive: makes a weight of it; None for what is none
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __getitem__(self, index: Any) -> "Arriving":
        if index is ...:
            return self
        return Arriving(self.tensor[index], self.arrive)

    def get_shape(self) -> list[int]:
        """Return the shape, as safetensors' slices do."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype under safetensors' name; for floating-point tensors."""
        return _DTYPES[self.dtype]

    def to(self, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """Return the tensor itself: float16 if it is a weight for a float32 model, else of ``dtype``."""
        if isinstance(device, torch.dtype):  # a packed part goes to the checkpoint's dtype before it goes on
            return self
        if self.arrive is not None and dtype in (None, torch.float32):
            return self.arrive(self.tensor)
        return plain(self.tensor.to(dtype=dtype))


_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def install() -> None:
    """Wrap the loaders once; they do nothing unless asked to."""
    from transformers import modeling_utils

    activate(modeling_utils)


def activate(module: ModuleType) -> None:
    """Make ``PreTrainedModel.from_pretrained`` of ``transformers.modeling_utils`` give patched models."""
    model_class: Any = module.PreTrainedModel
    wrappers = {"PreTrainedModel.from_pretrained": _from_pretrained}
    if _takes_arriving(model_class):
        wrappers["PreTrainedModel._load_pretrained_model"] = _load_pretrained_model
    if hasattr(model_class, "load_adapter"):
        wrappers["PreTrainedModel.load_adapter"] = _load_adapter
    stepping_aside.wrap(module, wrappers)
    saving.install(module)


def reads_packed_files() -> bool:
    """Whether this version of Transformers lets us say what the tensors of a file are."""
    from transformers import PreTrainedModel

    return _takes_arriving(PreTrainedModel)


def _takes_arriving(model_class: Any) -> bool:
    """Whether this version materialises a state dict as Transformers 5 does."""
    loader = getattr(model_class, "_load_pretrained_model", None)
    return loader is not None and set(inspect.signature(loader).parameters) >= _ARGUMENTS


_ARGUMENTS = {"model", "state_dict", "checkpoint_files", "load_config"}


def _load(wrapped: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    from transformers import PreTrainedModel

    loading.check_arguments(kwargs)
    options = loading.without_dtype(kwargs)
    if _takes_arriving(PreTrainedModel):
        return wrapped(*args, **{**options, "dtype": torch.float32})
    checkpoint_files.check_folder(args, kwargs)
    return wrapped(*args, **{**options, "torch_dtype": "auto"})


_from_pretrained = loading.hook(_load)


def _load_pretrained_model(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    ours = loading.current()
    call = inspect.signature(wrapped).bind(*args, **kwargs)
    saved = _said_by(call.arguments["load_config"].hf_quantizer)
    if ours is None:
        with nullcontext() if saved is None else loading.begun(saved):
            return _arrive(wrapped, call, saved)
    if saved is not None and not ours.strict:
        ours.follow(saved)
    return _arrive(wrapped, call, ours)


def _said_by(quantizer: Any) -> Loading | None:
    """Return what a checkpoint, or the program by an UpcastConfig, says to Transformers; None for other quantizers."""
    found = getattr(quantizer, "loading", None)
    return found if isinstance(found, Loading) else None


def _arrive(wrapped: Callable[..., Any], call: inspect.BoundArguments, ours: Loading | None) -> Any:
    """Have the tensors of a checkpoint arrive as ``ours`` says; None: as the library has it."""
    if ours is None:
        return wrapped(*call.args, **call.kwargs)
    model, state, files = (call.arguments[name] for name in ("model", "state_dict", "checkpoint_files"))
    _check(call.arguments["load_config"])
    checkpoint_files.check_inside(call.arguments["load_config"])
    mesh = call.arguments["load_config"].device_mesh
    ours.divided = mesh is not None
    if _are_packed(files):
        _check_whole(mesh)
        ours.policy = loading.of_packed_files(ours.policy)
    ours.check(model)
    if mesh is None:
        for file in files or ():
            with checkpoint_files.read_from(file):
                pages.read_ahead(Path(file))
    else:
        ours.memory = None  # what a rank gets is cut and copied once more
    tensors = _read(files, call.arguments["load_config"].weights_only) if state is None else state
    _agree(model, tensors, ours, mesh)
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    parts = _parts(tensors, call.arguments["load_config"])
    exact = _exact(model, tensors, call.arguments["load_config"], ours)
    call.arguments["state_dict"] = {
        name: Arriving(
            tensor,
            None
            if name.rpartition(".")[2] in buffers
            else functools.partial(
                ours.arrive, name, ours=state is None, in_place=name not in parts, exact=name in exact
            ),
        )
        for name, tensor in tensors.items()
    }
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with _one_by_one() if parts else nullcontext():
        result = wrapped(*call.args, **call.kwargs)
    _check_shapes(model, shapes)
    return result


def _are_packed(files: Sequence[str] | None) -> bool:
    """Whether a checkpoint's weights are packed in its files."""
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with checkpoint_files.read_from(file):
                if packed_file.is_packed(Path(file)):
                    return True
    return False


def _check_whole(mesh: Any) -> None:
    if mesh is not None:
        raise UpcastError(
            "packed weights, and a model that is divided between ranks; those take parts of ordinary weights. Convert "
            "the checkpoint back: python -m upcast convert FOLDER --storage bfloat16."
        )


def _check_shapes(model: Any, wanted: Mapping[str, torch.Size]) -> None:
    """Refuse packed weights of other shapes than the config's: with a quantizer, Transformers does not look."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, PackedWeight) and parameter.shape != wanted.get(name, parameter.shape):
            raise UpcastError(
                f"{name} is {tuple(parameter.shape)} in the checkpoint, and the config makes it {tuple(wanted[name])}; "
                "weights and config.json must belong together. Download or convert the checkpoint again."
            )


def _load_adapter(wrapped: Callable[..., Any], model: Any, args: Any, kwargs: Any) -> Any:
    """Patch a model that is being loaded before an adapter goes on top: then the adapter is made for float32.

    PEFT gives an adapter the dtype of its base, which is float16 until then, and the loader would round its numbers.
    """
    ours = loading.current()
    if ours is None:
        return wrapped(*args, **kwargs)
    ours.adopt(model)
    with loading.not_ours():
        return wrapped(*args, **kwargs)


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Have Transformers read parts when it needs them: its threads would hold all of them beside what they make.

    It asks a variable of the environment. One load of ours at a time (`loading`) sets it.
    """
    before = os.environ.get(_NO_THREADS)
    try:
        os.environ[_NO_THREADS] = "1"
        yield
        _put_back(before)
    except BaseException:
        _put_back(before)
        raise


def _put_back(variable: str | None) -> None:
    if variable is None:
        os.environ.pop(_NO_THREADS, None)
    else:
        os.environ[_NO_THREADS] = variable


_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def _check(settings: Any) -> None:
    """Refuse what Transformers has made of the arguments and of the checkpoint's config."""
    if settings.hf_quantizer is not None and _said_by(settings.hf_quantizer) is None:
        raise NotOurs("a quantized checkpoint")
    places = {str(place).split(":")[0] for place in (settings.device_map or {}).values()}
    if places - {"cpu"}:
        raise NotOurs(f"parts of it go to {', '.join(sorted(places - {'cpu'}))}")


def _parts(names: Iterable[str], settings: Any) -> set[str]:
    """Return the names of tensors from which Transformers puts others together, such as experts one by one."""
    from transformers import core_model_loading as library

    mapping = getattr(settings, "weight_mapping", None) or ()
    renamings = [entry for entry in mapping if isinstance(entry, library.WeightRenaming)]
    merging = [entry for entry in mapping if isinstance(entry, library.WeightConverter) and _merges(entry)]
    return {name for name in names if merging and library.rename_source_key(name, renamings, merging)[1] is not None}


def _exact(model: Any, names: Iterable[str], settings: Any, ours: Loading) -> set[str]:
    """Return the checkpoint's names of the tensors that go, whole or in parts, into what keeps all its digits."""
    if not ours.keep and not ours.trainable:
        return set()
    from transformers import core_model_loading as library

    mapping = getattr(settings, "weight_mapping", None) or ()
    renamings = [entry for entry in mapping if isinstance(entry, library.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, library.WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def is_exact(name: str) -> bool:
        target, converter = library.rename_source_key(name, renamings, converters, prefix, state)
        untouched, _ = library.rename_source_key(name, [], [], prefix, state)
        # What becomes several tensors, or takes a way of which only the library knows, is rounded later if at all.
        return converter is not None or any(map(ours.exact, (target, untouched)))

    return set(filter(is_exact, names))


def _merges(converter: Any) -> bool:
    """Whether a conversion puts several tensors into a new one; the others leave a tensor as it is, or views of it."""
    return any(type(operation).__name__ in _MERGING for operation in converter.operations)


_MERGING = {"MergeModulelist", "Concatenate", "ErnieFuseAndSplitTextVisionExperts"}


def _agree(model: Any, tensors: dict[str, Tensor], ours: Loading, mesh: Any) -> None:
    """Raise RankError where the ranks that divide the model are about to load different things."""
    if mesh is not None:
        from upcast.distributed import Group, consistency  # not every torch has it

        options = {"policy": str(ours.policy), "kv_cache": str(ours.kv_cache)}
        sizes = json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode()
        Group(mesh.get_group()).agree(consistency.record(sizes, tensors, **options))


def _read(files: Sequence[str] | None, weights_only: bool) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's files, mapped into memory."""
    from transformers.modeling_utils import load_state_dict

    tensors: dict[str, Tensor] = {}
    for file in files or ():
        with checkpoint_files.read_from(file):
            if str(file).endswith(".safetensors"):
                found = _mapped(file)
                if any(isinstance(tensor, PackedWeight) for tensor in found.values()):
                    tensors |= found  # looked at already
                    continue
            elif reading.is_mappable(Path(file)):
                found = load_state_dict(file, "cpu", weights_only)
            else:  # the library would map it all the same
                found = torch.load(file, map_location="cpu", weights_only=weights_only)
            tensors |= reading.checked(found, Path(file))
    return tensors


def _mapped(file: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    if packed_file.is_packed(Path(file)):
        return packed_file.read(Path(file))
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary

"""LitGPT: build a model from its checkpoint folder without a float32 copy, and LLM.load under UPCAST=1."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from upcast.checkpoint import reading
from upcast.core import config, pages
from upcast.core.errors import UpcastError
from upcast.core.torch_modes import float32_by_default, ordinary, outside_inference_mode
from upcast.guard.forward import watcher
from upcast.integrations import loading, stepping_aside
from upcast.integrations.litgpt import model_config, packed_folders
from upcast.integrations.stepping_aside import NotOurs
from upcast.patching import engine
from upcast.policy import policy as policies


def load_litgpt(
    checkpoint_dir: str | Path,
    *,
    policy: policies.Choice = "safe",
    keep: Sequence[str] = (),
    kv_cache: str | None = None,
    guard: bool = False,
    heal: bool = False,
    trainable: Sequence[str] = (),
    storage: str | None = None,
    mesh: Any = None,
    wire: str = "float32",
) -> Any:
    """Return the LitGPT model in ``checkpoint_dir``, patched and in eval mode.

    The model is built without memory and takes its weights from the mapped checkpoint: a float16 checkpoint is used
    as it is, without a copy; bfloat16 and float32 ones are rounded tensor by tensor, so that the peak is float16's
    size plus the largest tensor. What happens to the file afterwards does not reach the model: see
    docs/compatibility.md.

    Args:
        checkpoint_dir: a folder with ``model_config.yaml`` and ``lit_model.pth``, or one that `python -m upcast convert
            --storage packed` wrote, whose weights are then mapped and stay packed.
        policy: as for `upcast.patch`.
        keep: as for `upcast.patch`; what it names arrives in float32, with all its digits.
        kv_cache: as for `upcast.patch`.
        guard: as for `upcast.patch`.
        heal: as for `upcast.patch`.
        trainable: as for `upcast.patch`; what it names arrives in float32, with all its digits.
        storage: as for `upcast.patch`; what is packed is packed while it is read.
        mesh: a one-dimensional DeviceMesh on the CPU, such as `upcast.distributed.join` returns: the model is divided
            between its ranks, each of which takes only its part from the file. Every rank must call this, and then
            the model, alike; every rank gets the same logits. For inference only.
        wire: the dtype in which partial sums travel between ranks, ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Returns:
        ``litgpt.GPT`` whose weights are `upcast.HalfWeight` (or `upcast.PackedWeight`) and whose logits are float32.

    Raises:
        UpcastError: a file is missing, truncated, not a state dict, or belongs to another config; an unknown policy,
            pattern, kv_cache or storage. With mesh also, then and later: a policy other than safe, guard, heal, keep or
            trainable; the ranks differ in checkpoint, options or version; the model cannot be divided between so many;
            a rank is lost.

    Examples:
        >>> model = upcast.load_litgpt("checkpoints/EleutherAI/pythia-160m")
        >>> model(torch.tensor([[1, 2, 3]])).dtype
        torch.float32
    """
    policy = policies.stored(policy, storage)
    chosen = policies.resolve(policy)
    if mesh is not None:
        _check_divided(chosen, guard=guard, heal=heal, keep=keep, trainable=trainable)
    if kv_cache is not None:
        policies.check_kv_cache(kv_cache)
    folder = Path(checkpoint_dir)
    with _plainly():
        model, weights = _read_folder(folder, whole=mesh is None)
        policy = loading.policy_for(weights, policy)
        engine.check(model, policy, keep, trainable)
        if mesh is None:
            fill(model, weights, kv_cache, policy, guard, heal, keep, trainable)
            return model.eval()
        from upcast.integrations.litgpt import tensor_parallel

        chosen = policies.resolve(policy)
        return tensor_parallel.load(model, folder, weights, mesh, chosen, kv_cache or chosen.kv_cache, wire).eval()


def _check_divided(policy: policies.Policy, **options: Any) -> None:
    given = {name: value for name, value in options.items() if value}
    if given or not policy.everywhere:
        listed = "".join(f", {name}={value!r}" for name, value in given.items())
        raise UpcastError(
            f"mesh= with policy {str(policy)!r}{listed}; a model divided between ranks is for inference under 'safe', "
            "which needs no other option. Leave them out."
        )


@contextmanager
def _plainly() -> Iterator[None]:
    """Make ordinary float32 tensors on the CPU, whatever modes are on around the call."""
    with outside_inference_mode(), float32_by_default(), torch.device("cpu"):
        yield


def read_for(model: torch.nn.Module, path: Path, whole: bool = True) -> dict[str, Tensor]:
    """Return the mapped weights in ``path``; raise UpcastError if they are not those of ``model``.

    ``whole``: this process will read all of them.
    """
    weights = _read_weights(path, whole)
    _check_fits(model, weights, path)
    return weights


def _read_weights(path: Path, whole: bool) -> dict[str, Tensor]:
    if whole and path.is_file():
        pages.read_ahead(path)
    return packed_folders.read(path)


def _read_folder(folder: Path, whole: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """Return the folder's model, without memory, and its mapped weights."""
    fields, path = model_config.read(folder), model_config.weights(folder)
    weights = _read_weights(path, whole)
    model = model_config.build(folder, fields, weights)
    _check_fits(model, weights, path)
    return model, weights


def fill(
    model: Any,
    weights: dict[str, Tensor],
    kv_cache: str | None,
    policy: policies.Choice = "safe",
    guard: bool = False,
    heal: bool = False,
    keep: Sequence[str] = (),
    trainable: Sequence[str] = (),
) -> None:
    """Give a LitGPT model of any dtype, without weights or with others, the mapped ``weights``, and patch it.

    Where that fails the model is what it was before.
    """
    with _plainly(), stepping_aside.undone_if_it_fails(model):
        for name, tensor in weights.items():  # LitGPT's scripts read them in inference mode
            weights[name] = ordinary(tensor)
        known = reading.to_float16(weights, pages.Memory(), (*keep, *trainable), policies.resolve(policy).storage)
        model.load_state_dict(weights, assign=True)
        model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))
        loading.adopt(
            model, known, kv_cache, policy=policy, watcher=watcher(guard, heal), keep=keep, trainable=trainable
        )


def _check_fits(model: torch.nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse a checkpoint of another config, before anything is converted."""
    expected = model.state_dict()
    wrong = [f"{name} is missing" for name in expected if name not in weights]
    wrong += [f"{name} is not part of the model" for name in weights if name not in expected]
    wrong += [
        f"{name} is {tuple(weights[name].shape)}, the config says {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    wrong += [f"{name} is {tensor.dtype} on {tensor.device}" for name, tensor in weights.items() if not _dense(tensor)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        listed = "; ".join(each[:300] for each in wrong[:3])
        raise UpcastError(
            f"{path}: {listed}{more}; weights and model_config.yaml must belong together. "
            "Download or convert the checkpoint again."
        )


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor holds a model's numbers: LitGPT would convert integers, and copy from nothing."""
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.dtype in _FLOATS


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- UPCAST=1 -------------------------------------------------------------------------------------------------------


def activate(module: ModuleType) -> None:
    """Make ``LLM.load`` and ``LLM.distribute`` of ``litgpt.api`` give patched models."""
    loaders = {"LLM.load": _load, "LLM.distribute": _distribute}
    stepping_aside.wrap(module, {**loaders, **packed_folders.finders(module)})


def _load(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
    def theirs() -> Any:
        return wrapped(*args, **kwargs)

    def ours() -> Any:
        stepping_aside.check_enabled()
        call = arguments(wrapped, args, kwargs)
        if call["distribute"] != "auto":  # distribute() comes later
            raise NotOurs
        if accelerator("auto") == "cuda" or (call["init"] != "pretrained" and accelerator("auto") != "cpu"):
            raise NotOurs(f"the model goes to {accelerator('auto')}, not to the CPU")
        if call["init"] != "pretrained":
            return _patched(theirs())
        llm = wrapped(**{**call, "distribute": None})
        _place(llm, None)
        _say_where("LLM.load")
        return llm

    file = packed_folders.weights_of(args[0] if args else kwargs.get("model"))
    return packed_folders.attempt(file, "LLM.load", ours, theirs)


def _patched(llm: Any) -> Any:
    """Patch an LLM with random weights."""

    def ours() -> Any:
        settings, (keep, trainable) = config.read(), loading.patterns(llm)
        return engine.patch(
            llm, policy=policies.of(settings), kv_cache=settings.kv_cache, keep=keep, trainable=trainable
        )

    return llm if llm is None else stepping_aside.attempt("LLM.load", ours, lambda: llm)


def _distribute(wrapped: Callable[..., Any], llm: Any, args: Any, kwargs: Any) -> Any:
    def ours() -> None:
        stepping_aside.check_enabled()
        call = arguments(wrapped, args, kwargs)
        reason = _not_ours(llm, call)
        if reason:
            raise NotOurs(reason)
        _place(llm, call["fixed_kv_cache_size"])
        if call["accelerator"] == "auto":
            _say_where("LLM.distribute")

    file = packed_folders.weights_of(llm.checkpoint_dir)
    return packed_folders.attempt(file, "LLM.distribute", ours, lambda: wrapped(*args, **kwargs))


def _say_where(what: str) -> None:
    """Say on a Mac that the model is not where LitGPT takes it by itself: nobody had asked for that device."""
    if accelerator("auto") == "mps":
        stepping_aside.say_once(f"{what} chose the CPU, where upcast works, not MPS; accelerator='mps' asks for that")


# Of these, patching gives the numbers or better ones, in less memory; mixed ones and float64 are something else.
_IN_FLOAT32 = (None, 32, "32", "32-true", "16-true", "bf16-true")


def _not_ours(llm: Any, call: dict[str, Any]) -> str:
    """Return why this call of LLM.distribute is not for upcast, or an empty string."""
    target = accelerator(call["accelerator"])
    if target != "cpu" and (call["accelerator"] != "auto" or target != "mps"):
        return f"accelerator={target!r} is not the CPU"
    if llm.checkpoint_dir is None:
        return "there is no checkpoint"
    if call["quantize"] is not None:
        return f"quantize={call['quantize']!r}"
    if call["generate_strategy"] is not None:
        return f"generate_strategy={call['generate_strategy']!r}"
    if call["precision"] not in _IN_FLOAT32:
        return f"precision={call['precision']!r}"
    return ""


def _place(llm: Any, fixed_kv_cache_size: Any) -> None:
    """Give ``llm`` its patched model in a Fabric of float32 precision, as LLM.distribute would; all or nothing."""
    from lightning import Fabric
    from litgpt.utils import check_file_size_on_cpu_and_warn

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    check_file_size_on_cpu_and_warn(model_config.weights(llm.checkpoint_dir), fabric.device)
    model = load_by_environment(llm.checkpoint_dir)
    placed = {"model": fabric.setup_module(model), "fabric": fabric}
    placed["kv_cache_initialized"] = fixed_kv_cache_size is not None
    if fixed_kv_cache_size is not None:
        size = model.max_seq_length if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        model.set_kv_cache(batch_size=1, max_seq_length=size, device=fabric.device)
        placed["fixed_kv_cache_size"] = fixed_kv_cache_size
    llm.preprocessor.device = fabric.device
    with stepping_aside.undone_if_it_fails(llm):
        for name, value in placed.items():
            setattr(llm, name, value)


def load_by_environment(folder: Path) -> Any:
    """Return `load_litgpt` of ``folder`` as the environment asks for it."""
    settings = config.read()
    options: dict[str, Any] = {"policy": policies.of(settings), "kv_cache": settings.kv_cache}
    if settings.keep or settings.trainable:
        options["keep"], options["trainable"] = loading.patterns(_read_folder(folder)[0])
    return load_litgpt(folder, **options)


def accelerator(requested: str) -> str:
    """Return where LitGPT would put the model."""
    if requested != "auto":
        return requested
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments

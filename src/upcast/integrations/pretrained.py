"""`upcast.from_pretrained`: one function for what Transformers, PEFT and Diffusers load."""

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from upcast.core.errors import UpcastError
from upcast.integrations import checkpoint_files, diffusers, loading
from upcast.integrations.transformers import load
from upcast.patching import engine
from upcast.policy import policy as policies
from upcast.tensor.half_weight import HalfWeight


def from_pretrained(
    model_class: Any,
    *args: Any,
    kv_cache: str | None = None,
    policy: policies.Choice = "safe",
    keep: Sequence[str] = (),
    trainable: Sequence[str] = (),
    storage: str | None = None,
    **kwargs: Any,
) -> Any:
    """Return ``model_class.from_pretrained(*args, **kwargs)``, patched, without a float32 copy on the way.

    A float16 checkpoint is mapped into memory and used as it is; bfloat16 and float32 ones are rounded tensor by
    tensor, so that the peak is float16's size plus the largest tensors. What happens to the files afterwards does not
    reach the model: see docs/compatibility.md. ``dtype`` may be float16, bfloat16, float32 or "auto": the model says
    float32 and is stored in float16.

    Args:
        model_class: a model or Auto class of Transformers or PEFT, a model or pipeline class of Diffusers.
        args: as for its ``from_pretrained``.
        kv_cache: as for `upcast.patch`.
        policy: as for `upcast.patch`.
        keep: as for `upcast.patch`; what it names arrives in float32, with all its digits. Of a pipeline each pattern
            has to name something of every model.
        trainable: as ``keep``; what it names learns.
        storage: as for `upcast.patch`; what is packed is packed while it is read.
        kwargs: as for its ``from_pretrained``.

    Raises:
        UpcastError: the class has no loader that upcast knows, the arguments ask for another device, for quantization
            or for another dtype, kv_cache, policy or storage is unknown, or a pattern names nothing.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = upcast.from_pretrained(AutoModelForCausalLM, "path/to/model")
        >>> model.dtype
        torch.float32
    """
    policy = policies.stored(policy, storage)
    policies.resolve(policy)
    if kv_cache is not None:
        policies.check_kv_cache(kv_cache)
    library = next((c.__module__.split(".")[0] for c in getattr(model_class, "__mro__", ()) if _known(c)), None)
    if library is None:
        raise UpcastError(
            f"{getattr(model_class, '__name__', model_class)!r}; from_pretrained takes a class of Transformers or "
            "Diffusers. For other models, load them and call upcast.patch(model)."
        )
    if library in ("transformers", "peft"):
        load.install()
    else:
        diffusers.install()
        _also_transformers()
    request = loading.Loading(kv_cache, policy, keep, trainable, strict=True)
    with checkpoint_files.loaded_from(args, kwargs), loading.requested(request):
        result = model_class.from_pretrained(*args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if isinstance(model, nn.Module) and not any(isinstance(p, HalfWeight) for p in model.parameters()):
        engine.patch(model, policy=policy, kv_cache=kv_cache, keep=keep, trainable=trainable)
    return result


def _known(candidate: Any) -> bool:
    library = candidate.__module__.split(".")[0]
    return library in ("transformers", "diffusers", "peft") and hasattr(candidate, "from_pretrained")


def _also_transformers() -> None:
    """Pipelines of Diffusers load text encoders of Transformers."""
    with contextlib.suppress(ImportError):
        load.install()

"""The public verbs: patch, patched; unpatch, report and plan as they are."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import upcast.core.torch_private  # noqa: F401 - first: it says what a torch lacks
from upcast.analysis.report import report
from upcast.guard.forward import watcher
from upcast.patching import engine
from upcast.patching.engine import unpatch
from upcast.patching.parts import roots_of
from upcast.patching.plan import plan
from upcast.policy.policy import Choice, stored

__all__ = ["patch", "patched", "plan", "report", "unpatch"]

Model = TypeVar("Model")


def patch(
    model: Model,
    *,
    policy: Choice = "safe",
    keep: Sequence[str] = (),
    kv_cache: str | None = None,
    guard: bool = False,
    heal: bool = False,
    trainable: Sequence[str] = (),
    storage: str | None = None,
) -> Model:
    """Store the weights of ``model`` in float16 and compute in float32. In place; returns the same object.

    Weights (parameters of two dimensions and more) are rounded to nearest float16; those that are float16 already are
    used as they are, without a copy. Vectors and half-precision buffers become float32. A weight with a value beyond
    65504, or one that is not finite, stays in float32. The weights are frozen: gradients flow through, not into them.
    Where some weights are frozen and others require grad, as with adapters, those that require grad stay the float32
    parameters that they are: an optimizer that holds them goes on.
    While it works, up to float32's and float16's bytes exist side by side; `upcast.load_litgpt` avoids that.
    Of a pipeline of Diffusers all models are patched, or none; those that are patched already stay as they are.

    Args:
        model: any module on the CPU; a litgpt ``LLM``, a Fabric-wrapped module, a Transformers model or pipeline,
            a pipeline of Diffusers.
        policy: which op classes run in float32: ``"safe"`` (all of them), ``"sensitive"``, ``"none"``, any other policy
            string, an `upcast.Policy`, what `upcast.search` returned, or the path of a saved one.
        keep: patterns of parameter or module names to hold in float32 (``*`` and ``?`` as in file names). Of a pipeline
            of Diffusers each pattern has to name something of every model.
        kv_cache: how keys and values are kept, by a LitGPT model unless ``set_kv_cache`` is given a dtype, and by
            Transformers': ``"float16"`` (half the bytes; a layer whose keys or values are too large for it goes to
            float32, and says so; now and then a sampled token differs) or ``"float32"``. None: the policy's.
        guard: raise an UpcastError that names the first module and operation when the result is not finite; in
            training also when the loss or a gradient is not, and with the step. The gradient of the result is held
            until the backward pass ends.
        heal: under a policy other than safe, when the result is not finite, upcast the smallest set of op classes that
            cures it, run the step again, say so, and go on with that set.
        storage: how weights are stored. ``"float16"``: 16 bits, rounded. ``"packed"``: 12 bits for a weight that has
            bfloat16's numbers, as nearly all checkpoints of today have, without rounding anything; the others go to
            float16. ``"auto"``: the same, but a weight with many unusual numbers goes to float16, which is faster for
            it. ``"float32"``: as it is. None: the policy's, which is float16.
        trainable: patterns of what learns, of the parameters that require grad; the others are frozen. Without it, all
            that require grad learn, unless most of the model does: that is taken for inference, and the plan says so.

    Raises:
        UpcastError: not a module, on another device, patched already, in use by an optimizer, everything or nothing to
            train under ``trainable``, an unknown policy, pattern, kv_cache or storage, a saved policy for another
            architecture, another thread at work on it. Nothing has been changed then, nor when it is interrupted before
            it is whole.

    Examples:
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> upcast.patch(model) is model
        True
        >>> model.weight.dtype, model.weight.stored.dtype
        (torch.float32, torch.float16)
        >>> model(torch.randn(1, 8)).dtype
        torch.float32
    """
    return engine.patch(
        model,
        policy=stored(policy, storage),
        keep=keep,
        kv_cache=kv_cache,
        trainable=trainable,
        watcher=watcher(guard, heal),
    )


@contextmanager
def patched(
    model: Model,
    *,
    policy: Choice = "safe",
    keep: Sequence[str] = (),
    kv_cache: str | None = None,
    storage: str | None = None,
) -> Iterator[Model]:
    """Patch ``model`` for a ``with`` block; afterwards its original tensors are back, bit for bit.

    The originals stay in memory for that time, and come back wherever the block is interrupted. Arguments and errors as
    for `patch`.

    Examples:
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> before = model.weight
        >>> with upcast.patched(model):
        ...     model.weight.nbytes  # 2 bytes a number
        64
        >>> model.weight is before
        True
    """
    policy = stored(policy, storage)
    with ExitStack() as stack:
        for root in dict.fromkeys(roots_of(model).values()):
            engine.say(stack.enter_context(engine.borrowed(root, policy=policy, keep=keep, kv_cache=kv_cache)))
        yield model

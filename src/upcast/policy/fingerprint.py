"""The fingerprint of an architecture: what a saved policy was measured on."""

import hashlib
from typing import Any

from torch import nn

from upcast.core.errors import UpcastError
from upcast.core.module_tree import named_modules


def of(root: nn.Module) -> dict[str, Any]:
    """Return class name, number of parameters, and a hash of the modules' kinds and names and the tensors' shapes."""
    digest, count = hashlib.sha256(), 0
    for name, module in named_modules(root):
        digest.update(f"{name} {type(module).__name__}\n".encode())
    for name, tensor in root.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        count += tensor.numel()
    return {"model": type(root).__name__, "parameters": count, "hash": digest.hexdigest()[:16]}


def check(root: nn.Module, saved: dict[str, Any], loaded: bool = True) -> None:
    """Raise UpcastError if a saved policy's fields name another architecture than that of ``root``.

    Not ``loaded``: a library may tie some of its weights yet, so that they count once.
    """
    theirs, ours = saved.get("architecture"), of(root)
    if theirs is None or theirs == ours:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    if not loaded and theirs.get("model") == ours["model"] and theirs.get("parameters", 0) < ours["parameters"]:
        return
    raise UpcastError(
        f"the saved policy {saved['policy']!r} was measured on {_shown(theirs)}, and this is {_shown(ours)}; what is "
        "enough for one architecture need not be for another. Run upcast.search on this model."
    )


def _shown(architecture: dict[str, Any]) -> str:
    """Return an architecture for people; that of a file may hold anything."""
    model, count, digest = (architecture.get(key) for key in ("model", "parameters", "hash"))
    number = f"{count:,}" if isinstance(count, int) else "unknown"
    return f"a {str(model)[:100]} of {number} parameters (architecture {str(digest)[:100]})"

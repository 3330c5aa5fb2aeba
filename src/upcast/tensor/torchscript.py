"""Patched models and TorchScript: torch.jit.script, torch.jit.trace and the ONNX export that is built on tracing.

A traced function keeps float16 weights as constants, and upcasts them when it runs; the old ONNX exporter takes them as
they are. A traced module keeps its parameters by their memory: they become float32 before it is traced. Compiled by
torch.jit.script, a module would run without us; that is refused.
"""

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from upcast.core.errors import UpcastError
from upcast.tensor import materialize

if TYPE_CHECKING:
    from upcast.tensor.half_weight import HalfWeight

TRACE = "torch.jit.trace keeps the parameters of a module by their memory"
_trace: Any = torch.jit._trace


def refuse_script() -> NoReturn:
    """Refuse torch.jit.script, which asks a module for this under the name ``__prepare_scriptable__``."""
    raise UpcastError(
        "torch.jit.script of a patched model, or a part of one; it compiles the code of layers for ordinary tensors, "
        "and weights stored in float16 are none. Call upcast.unpatch(model) first, or use "
        "torch.export.export or torch.compile."
    )


def look(weight: "HalfWeight") -> None:
    """Make ``weight`` float32 if torch.jit.trace looks at it: it hashes all parameters before it runs a module."""
    if _trace._trace_module_map is not None and torch._C._get_tracing_state() is None:
        materialize.materialize(weight, TRACE)


def exports_onnx() -> bool:
    """Whether the model is on its way to ONNX: the old exporter takes what a state dict holds for inputs."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and bool(onnx.is_in_onnx_export())

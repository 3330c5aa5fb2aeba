"""float16 weights, float32 math, no NaNs: one line, on any PyTorch model, on CPU."""

from importlib import import_module as _import_module
from importlib.metadata import version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from upcast import attention as _attention
from upcast import compiled as _compiled
from upcast import composites as _composites
from upcast import exported as _exported
from upcast import memory_ops as _memory_ops
from upcast import ops as _ops
from upcast import products as _products
from upcast import recurrent as _recurrent
from upcast import shallow_copy as _shallow_copy
from upcast.ablation import Ablation, ablate
from upcast.api import patch, patched, plan, report, unpatch
from upcast.certify import Certificate, certify
from upcast.diagnose import Diagnosis, diagnose
from upcast.errors import UpcastError
from upcast.half_weight import HalfWeight
from upcast.headroom import Headroom
from upcast.integrations.litgpt import load_litgpt
from upcast.integrations.pretrained import from_pretrained
from upcast.planning import Plan
from upcast.policy import Policy
from upcast.search import Found, search

if _TYPE_CHECKING:
    from upcast.integrations.fabric import FabricPrecision
    from upcast.integrations.lightning import LightningHeadroomCallback
    from upcast.integrations.transformers_trainer import HeadroomCallback

__all__ = [
    "Ablation",
    "Certificate",
    "Diagnosis",
    "FabricPrecision",
    "Found",
    "HalfWeight",
    "Headroom",
    "HeadroomCallback",
    "LightningHeadroomCallback",
    "Plan",
    "Policy",
    "UpcastError",
    "ablate",
    "certify",
    "diagnose",
    "from_pretrained",
    "load_litgpt",
    "patch",
    "patched",
    "plan",
    "report",
    "search",
    "unpatch",
]
__version__ = version("upcast")

del (
    _attention,
    _compiled,
    _composites,
    _exported,
    _memory_ops,
    _ops,
    _products,
    _recurrent,
    _shallow_copy,
    version,
)  # imported so that HalfWeight and torch.compile know the operations


_LAZY = {  # name -> its module, and what that needs, which upcast does not
    "FabricPrecision": ("fabric", "Lightning", "a plugin of lightning.Fabric", "lightning"),
    "HeadroomCallback": ("transformers_trainer", "Transformers", "a callback of its Trainer", "transformers"),
    "LightningHeadroomCallback": ("lightning", "Lightning", "a callback of its Trainer", "lightning"),
}


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, library, what, package = _LAZY[name]
    try:
        return getattr(_import_module(f"upcast.integrations.{module}"), name)
    except ModuleNotFoundError as error:
        raise UpcastError(
            f"upcast.{name} without {library} ({error}); it is {what}. Run `pip install {package}`."
        ) from None

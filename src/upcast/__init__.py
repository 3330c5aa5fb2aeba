"""float16 weights, float32 math, no NaNs: one line, on any PyTorch model, on CPU."""

from importlib.metadata import version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from upcast import attention as _attention
from upcast import compiled as _compiled
from upcast import composites as _composites
from upcast import exported as _exported
from upcast import ops as _ops
from upcast import products as _products
from upcast import recurrent as _recurrent
from upcast.ablation import Ablation, ablate
from upcast.certify import Certificate, certify
from upcast.diagnose import Diagnosis, diagnose
from upcast.errors import UpcastError
from upcast.half_weight import HalfWeight
from upcast.integrations.litgpt import load_litgpt
from upcast.integrations.loading import from_pretrained
from upcast.patching import patch, patched, report, unpatch
from upcast.planning import Plan, plan
from upcast.policy import Policy
from upcast.search import Found, search

if _TYPE_CHECKING:
    from upcast.integrations.fabric import FabricPrecision

__all__ = [
    "Ablation",
    "Certificate",
    "Diagnosis",
    "FabricPrecision",
    "Found",
    "HalfWeight",
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
    _ops,
    _products,
    _recurrent,
    version,
)  # imported so that HalfWeight and torch.compile know the operations


def __getattr__(name: str) -> _Any:
    if name == "FabricPrecision":  # needs Lightning, which upcast does not
        try:
            from upcast.integrations.fabric import FabricPrecision
        except ModuleNotFoundError as error:
            raise UpcastError(
                f"upcast.FabricPrecision without Lightning ({error}); it is a plugin of lightning.Fabric. "
                "Run `pip install lightning`."
            ) from None
        return FabricPrecision
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

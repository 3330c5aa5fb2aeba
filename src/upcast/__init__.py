"""float16 weights, float32 math, no NaNs: one line, on any PyTorch model, on CPU."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from _upcast_startup import is_command as _is_command
from upcast.core.about import VERSION as _VERSION

if _TYPE_CHECKING:
    from upcast.analysis.ablate import Ablation, ablate
    from upcast.analysis.certify import Certificate, certify
    from upcast.analysis.diagnose import Diagnosis, diagnose
    from upcast.analysis.search import SearchResult, search
    from upcast.api import patch, patched, plan, report, unpatch
    from upcast.core.errors import UpcastError
    from upcast.guard.headroom import Headroom
    from upcast.integrations.lightning.callback import LightningHeadroomCallback
    from upcast.integrations.lightning.fabric import FabricPrecision
    from upcast.integrations.litgpt.load import load_litgpt
    from upcast.integrations.pretrained import from_pretrained
    from upcast.integrations.transformers.quantizer import UpcastConfig
    from upcast.integrations.transformers.trainer import HeadroomCallback
    from upcast.patching.plan import Plan
    from upcast.policy.policy import Policy
    from upcast.tensor.half_weight import HalfWeight
    from upcast.tensor.packed_weight import PackedWeight

__all__ = [
    "Ablation",
    "Certificate",
    "Diagnosis",
    "FabricPrecision",
    "HalfWeight",
    "Headroom",
    "HeadroomCallback",
    "LightningHeadroomCallback",
    "PackedWeight",
    "Plan",
    "Policy",
    "SearchResult",
    "UpcastConfig",
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
__version__ = _VERSION

_ON_DEMAND = {  # name -> its module: analysis and loaders are imported when somebody asks for them
    "patch": "api",
    "patched": "api",
    "plan": "api",
    "report": "api",
    "unpatch": "api",
    "HalfWeight": "tensor.half_weight",
    "PackedWeight": "tensor.packed_weight",
    "Plan": "patching.plan",
    "Policy": "policy.policy",
    "UpcastError": "core.errors",
    "Ablation": "analysis.ablate",
    "ablate": "analysis.ablate",
    "Certificate": "analysis.certify",
    "certify": "analysis.certify",
    "Diagnosis": "analysis.diagnose",
    "diagnose": "analysis.diagnose",
    "SearchResult": "analysis.search",
    "search": "analysis.search",
    "Headroom": "guard.headroom",
    "load_litgpt": "integrations.litgpt.load",
    "from_pretrained": "integrations.pretrained",
    "FabricPrecision": "integrations.lightning.fabric",
    "HeadroomCallback": "integrations.transformers.trainer",
    "LightningHeadroomCallback": "integrations.lightning.callback",
    "UpcastConfig": "integrations.transformers.quantizer",
}
_PACKAGES = (
    *("analysis", "checkpoint", "cli", "core", "distributed", "guard", "integrations", "kernels", "patching"),
    *("policy", "tensor"),
)
_NEEDS = {  # name -> the library that upcast does without, what the name is there, and the package to install
    "FabricPrecision": ("Lightning", "a plugin of lightning.Fabric", "lightning"),
    "HeadroomCallback": ("Transformers", "a callback of its Trainer", "transformers"),
    "LightningHeadroomCallback": ("Lightning", "a callback of its Trainer", "lightning"),
    "UpcastConfig": ("Transformers", "the quantization_config of its from_pretrained", "transformers"),
}


def __getattr__(name: str) -> _Any:
    if name in _PACKAGES:
        return _import_module(f"upcast.{name}")
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_module("upcast.integrations")  # which registers itself: whatever is asked for, all of it is in place
    try:
        found = getattr(_import_module(f"upcast.{_ON_DEMAND[name]}"), name)
    except ModuleNotFoundError as error:
        if name not in _NEEDS:
            raise
        from upcast.core.errors import UpcastError

        library, what, package = _NEEDS[name]
        raise UpcastError(
            f"upcast.{name} without {library} ({error}); it is {what}. Run `pip install {package}`."
        ) from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


# From here on torch knows our operations, and the core what is special about libraries. The help of the command line
# needs neither.
if not _is_command():
    _import_module("upcast.api")
    _import_module("upcast.integrations")

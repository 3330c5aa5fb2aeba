"""The extension module `_native`: whether it is there, what it runs on, and which instruction set is in use."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from upcast.core.errors import KernelError, UpcastError


def _load() -> tuple[ModuleType | None, str | None]:
    """The extension module, or None and the reason why there is none."""
    try:
        return importlib.import_module("upcast.kernels._native"), None
    except ImportError as error:
        note = Path(__file__).with_name("native_missing.txt")
        return None, note.read_text().strip() if note.exists() else str(error)


def _attach_pool(module: ModuleType) -> None:
    """Point the kernels at the OpenMP library that torch itself is linked to, whatever its file is called."""
    libraries = Path(torch.__file__).parent / "lib"
    suffix = "dylib" if sys.platform == "darwin" else "so"
    for candidate in [libraries / f"libtorch_cpu.{suffix}", *sorted(libraries.glob("lib*omp*"))]:
        if module.attach_pool(str(candidate)):
            return


_module, _load_error = _load()
native: Any = _module
exchange = False
torch_rows = 0
"""Rows of x from which torch's own product on upcast tiles is faster than ours; 0: never. See `tuning`."""
if _module is not None:
    exchange = _module.setup(KernelError, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    _attach_pool(_module)
    torch_rows = _module.tuning()[1]


def prefers_torch(rows: int) -> bool:
    """Whether a product of so many rows of x is left to torch."""
    return 0 < torch_rows <= rows


def available() -> bool:
    """Whether the native library is loaded."""
    return _module is not None


def load_error() -> str | None:
    """Why the native library is not loaded, or None."""
    return _load_error


def info() -> dict[str, Any]:
    """What runs: `isa` in use, `available` levels best first, `compiler`, `threads`, `exchange`."""
    if _module is None:
        return {"isa": None, "available": (), "compiler": None, "threads": None, "exchange": None}
    return {
        "isa": _module.level(),
        "available": _module.levels(),
        "compiler": _module.compiler(),
        "threads": _module.pool(),
        "exchange": "dlpack" if exchange else "data_ptr",
    }


def level() -> str:
    """The instruction set in use."""
    return str(native.level())


def set_isa(name: str) -> None:
    """Run the level `name`, one of `info()["available"]`, from the next call on."""
    if _module is None:
        raise UpcastError(f"the native kernels are missing: {_load_error}; there is no level to choose.")
    if not _module.force_level(name):
        levels = ", ".join(_module.levels())
        raise UpcastError(f"instruction set {name!r} cannot run here; this machine runs {levels}. Choose one of these.")

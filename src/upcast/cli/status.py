"""What ``python -m upcast status`` says: what is active, and why."""

import importlib.metadata
import platform
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

import _upcast_startup
from upcast import kernels
from upcast.core import config, console, torch_private
from upcast.core.about import VERSION
from upcast.integrations.litgpt import versions as litgpt_versions
from upcast.integrations.transformers import versions as transformers_versions
from upcast.integrations.versions import installed, newer

FUSED = {"litgpt": litgpt_versions.NEWEST, "transformers": transformers_versions.NEWEST}
LIBRARIES = ("torch", "wrapt", "litgpt", "transformers", "diffusers")


def describe() -> str:
    """Return the whole status as a table of topic and finding."""
    settings = config.read()
    rows = [
        ("upcast", f"{VERSION} on Python {platform.python_version()}, {platform.machine()}"),
        ("active", _active(settings.enabled)),
        ("start-up file", _startup_file()),
        ("loaders", ", ".join(_loader(target) for target in _upcast_startup.TARGETS)),
        ("kernels", f"{kernels.describe()}, UPCAST_KERNELS={settings.kernels}"),
        ("threads", str(torch.get_num_threads())),
        ("fused forwards", _fused()),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)),
    ]
    rows += [(variable.name, f"{config.shown(variable)}: {variable.meaning}") for variable in config.VARIABLES]
    return console.table(("what", "finding"), rows)


def _active(enabled: bool) -> str:
    if not enabled:
        return "no: UPCAST is not set to 1; upcast.patch(model) works all the same"
    if not _upcast_startup.started():
        return "no: UPCAST is on, but the start-up file did not run (python -S or -I?): use python -m upcast run"
    return "yes: UPCAST is on"


def _startup_file() -> str:
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    found = [str(path) for folder in folders if (path := Path(folder) / "upcast.pth").is_file()]
    return found[0] if found else "not installed: use python -m upcast run script.py"


def _loader(target: str) -> str:
    library = target.split(".", maxsplit=1)[0]
    if find_spec(library) is None:
        return f"{library} not installed"
    return f"{target} {'loaded' if target in sys.modules else 'when imported'}"


def _fused() -> str:
    """Return for which libraries fused forwards run, by their versions, and why not for others."""
    why_not = torch_private.why_unfused()
    lines = [why_not or newer(name, newest) or f"{name} yes" for name, newest in FUSED.items() if installed(name)]
    return ", ".join(dict.fromkeys(lines)) or "no library of which upcast has any"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

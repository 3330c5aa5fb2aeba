"""What ``python -m upcast status`` says: what is active, and why."""

import importlib.metadata
import platform
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import _upcast_startup
from upcast import kernels
from upcast.core import config, torch_private
from upcast.core.about import VERSION
from upcast.integrations.litgpt import versions as litgpt_versions
from upcast.integrations.transformers import versions as transformers_versions
from upcast.integrations.versions import installed, newer

FUSED = {"litgpt": litgpt_versions.NEWEST, "transformers": transformers_versions.NEWEST}
LIBRARIES = ("torch", "wrapt", "litgpt", "transformers", "diffusers")


def facts() -> dict[str, Any]:
    """Return what is active and why, topic by topic."""
    settings = config.read()
    return {
        "upcast": f"{VERSION} on Python {platform.python_version()}, {platform.machine()}",
        "active": _active(settings.enabled),
        "start-up file": _startup_file(),
        "loaders": {target: _loader(target) for target in _upcast_startup.TARGETS},
        "kernels": f"{kernels.describe()}, UPCAST_KERNELS={settings.kernels}",
        "reading weights": kernels.tuning.describe(),
        "threads": torch.get_num_threads(),
        "fused forwards": _fused(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "variables": {variable.name: config.shown(variable) for variable in config.VARIABLES},
    }


def rows() -> list[tuple[str, str]]:
    """Return `facts` for people: (topic, finding)."""
    found = facts()
    meanings = {variable.name: variable.meaning for variable in config.VARIABLES}
    variables = [(name, f"{value}: {meanings[name]}") for name, value in found.pop("variables").items()]
    found["loaders"] = ", ".join(_by_library(found["loaders"]))
    found["libraries"] = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    return [*((topic, str(finding)) for topic, finding in found.items()), *variables]


def _by_library(loaders: dict[str, str]) -> list[str]:
    """Return the states of the loaders, a library at a time where all of its modules are in the same one."""
    lines: list[str] = []
    for library in dict.fromkeys(target.partition(".")[0] for target in loaders):
        states = {target: state for target, state in loaders.items() if target.partition(".")[0] == library}
        alike = len({*states.values()}) == 1
        lines += [f"{library} {next(iter(states.values()))}"] if alike else [f"{t} {s}" for t, s in states.items()]
    return lines


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
    """Return what state the loaders of a module are in."""
    if find_spec(target.split(".", maxsplit=1)[0]) is None:
        return "not installed"
    return "loaded" if target in sys.modules else "when imported"


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

"""The circumstances a figure depends on: machine, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

PACKAGES = ("torch", "litgpt", "lightning", "numpy", "tokenizers", "upcast")
VECTORS = ("avx512f", "avx512_bf16", "avx512_fp16", "avx2", "f16c")
REPOSITORY = Path(__file__).resolve().parents[2]


def describe() -> dict[str, object]:
    """CPU, memory and operating system; no name of the machine or of its user."""
    return {
        "cpu": cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The CPU's name, and the widest vector instructions that matter to these kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    vectors = [name for name in VECTORS if name in flags]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(vectors)})" if vectors else name


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit measured, `-dirty` where files differ from it; None outside a git checkout."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return outcome.stdout.strip() or None

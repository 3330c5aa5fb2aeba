"""The whole package on aarch64, emulated: Debian's Python in a folder, PyPI's torch, our wheel, qemu's user mode.

    python tools/aarch64.py WHEEL [pytest's arguments]

Everything is in build/platforms/aarch64; what is there is used again. apt-get and dpkg-deb are needed, root is not.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from debian import Debian

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "platforms" / "aarch64"
SYSTEM, EMULATOR = WORK / "root", WORK / "host" / "usr" / "bin" / "qemu-aarch64-static"
PACKAGES = SYSTEM / "usr" / "local" / "lib" / "python3.11" / "dist-packages"
REQUIREMENTS = ROOT / "tests" / "platforms" / "aarch64.txt"
SUITE = "bookworm"  # with Python 3.11
PLATFORMS = ("manylinux_2_28", "manylinux2014", "manylinux_2_17")

# Programs start each other by this name: the system does not know that it needs an emulator for them.
PYTHON = """#!/bin/sh
QEMU_CPU=neoverse-n1 PYTHONHOME="{system}/usr" \\
  exec "{emulator}" -L "{system}" -0 "$0" "{system}/usr/bin/python3.11" "$@"
"""


def main() -> int:
    wheel, *arguments = sys.argv[1:]
    prepare()
    install(Path(wheel))
    command = [str(WORK / "python"), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"}).returncode


def prepare() -> None:
    """Make the system, unless the same one is there."""
    made = WORK / "made"
    asked = f"{SUITE}\n{REQUIREMENTS.read_text()}"
    if made.is_file() and made.read_text() == asked:
        return
    shutil.rmtree(WORK, ignore_errors=True)
    Debian(WORK / "apt-arm64", SUITE, "arm64").unpack(SYSTEM, "python3.11", "libgomp1", "libstdc++6", "zlib1g")
    Debian(WORK / "apt-amd64", SUITE, "amd64").unpack(WORK / "host", "qemu-user-static")
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--only-binary", ":all:", *platforms]
    pip += ["--python-version", "3.11", "--implementation", "cp", "--target", str(PACKAGES), "-r", str(REQUIREMENTS)]
    subprocess.run(pip, check=True)
    (WORK / "python").write_text(PYTHON.format(system=SYSTEM, emulator=EMULATOR))
    (WORK / "python").chmod(0o755)
    made.write_text(asked)


def install(wheel: Path) -> None:
    """Put our wheel into the system, in place of an older one."""
    for old in (*PACKAGES.glob("torch_upcast-*"), PACKAGES / "upcast"):
        shutil.rmtree(old, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(PACKAGES)


if __name__ == "__main__":
    sys.exit(main())

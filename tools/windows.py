"""What linking a module for Windows' Python takes, where there is no Windows: its headers and an import library.

Both are in CPython's source, which Debian has: the headers, with Windows' own pyconfig.h, and the list of all that
python3.dll exports, the limited API, out of which zig makes the library.
"""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from debian import Debian

SUITE, PACKAGE = "trixie", "python3.13"


def prepare(folder: Path) -> Path:
    """Make both in ``folder``, if they are not there yet, and return it."""
    headers, library = folder / "include", folder / "libpython3.a"
    if not library.exists():
        source = unpacked(folder)
        shutil.rmtree(headers, ignore_errors=True)
        shutil.copytree(source / "Include", headers)
        shutil.copy(source / "PC" / "pyconfig.h.in", headers / "pyconfig.h")
        exports = folder / "python3.def"
        exports.write_text(definitions((source / "PC" / "python3dll.c").read_text()))
        zig = [sys.executable, "-m", "ziglang", "dlltool", "-m", "i386:x86-64"]
        subprocess.run([*zig, "-d", str(exports), "-l", str(library)], check=True)
    return folder


def unpacked(folder: Path) -> Path:
    """CPython's source."""
    archive = Debian(folder / "apt", SUITE, "amd64").source(PACKAGE)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.glob("Python-*")
    return source


def definitions(source: str) -> str:
    """The linker's list of what python3.dll exports, out of the C file that makes it export that."""
    found = re.findall(r"^EXPORT_(FUNC|DATA)\((\w+)\)", source, re.MULTILINE)
    assert found, "python3dll.c has another form now"
    names = [f"{name} DATA" if kind == "DATA" else name for kind, name in found]
    return "\n".join(["LIBRARY python3.dll", "EXPORTS", *names, ""])

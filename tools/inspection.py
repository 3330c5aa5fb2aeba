"""What is in a wheel, what it needs of the system that it is installed on, and whether that is what its name says."""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MUST = ("upcast/py.typed", "upcast.pth", "upcast.start", "_upcast_startup.py", "upcast/__init__.py")
MUST_NOT = (".cpp", ".hpp", ".c", ".h", ".cmake", "CMakeLists.txt", "native_missing.txt", ".o")
BEGIN, END = "<!-- wheels: begin (written by tools/wheels.py) -->", "<!-- wheels: end -->"
OF_MACOS = ("/usr/lib/libSystem.B.dylib",)
OF_WINDOWS = ("KERNEL32.dll", "python3.dll")
OLDEST_MACOS, ARM64, DYLIB = (11, 0), 0x0100000C, 6


def look(wheel: Path, system: str) -> dict[str, str]:
    """Check a wheel; return its name, size and needs. What is wrong ends the program."""
    with zipfile.ZipFile(wheel) as archive, TemporaryDirectory() as folder:
        names = archive.namelist()
        missing = [name for name in MUST if name not in names]
        surplus = [name for name in names if name.endswith(MUST_NOT)]
        libraries = [name for name in names if name.startswith("upcast/kernels/_native.")]
        metadata = next(archive.read(name).decode() for name in names if name.endswith("dist-info/METADATA"))
        if missing or surplus or len(libraries) != 1:
            sys.exit(f"{wheel.name}: missing {missing}, not wanted {surplus}, native libraries {libraries}")
        library = Path(archive.extract(libraries[0], folder))
        needs = {"Windows": of_windows, "Darwin": of_macos}[system](library) if system != "Linux" else of_linux(wheel)
    check_metadata(metadata, release=False)
    size = f"{wheel.stat().st_size / 1e6:.2f} MB"
    return {"wheel": f"`{wheel.name}`", "size": size, "needs": needs}


def check_metadata(text: str, release: bool) -> None:
    """End the program where a link of the long description is relative, or, for a release, there is no address."""
    found = Parser().parsestr(text)
    relative = re.findall(r"\]\((?!https?:|#|mailto:)[^)]+\)", found.get_payload())
    if relative:
        sys.exit(f"relative links in the long description: {relative}")
    if release and not found.get_all("Project-URL"):
        sys.exit("no project address in the metadata; set UPCAST_REPOSITORY")


def of_linux(wheel: Path) -> str:
    """The libraries and symbol versions that a Linux wheel needs, if its name promises no less."""
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], check=True, text=True, capture_output=True
    ).stdout
    said = " ".join(shown.split())
    (fits,) = re.findall(r'consistent with the following platform tag: "(manylinux_\d+_\d+)_', said)
    (named,) = re.findall(r"manylinux_\d+_\d+", wheel.name)
    if [int(part) for part in fits.split("_")[1:]] > [int(part) for part in named.split("_")[1:]]:
        sys.exit(f"{wheel.name} needs {fits}:\n{shown}")
    libraries = sorted(set(re.findall(r"\blib\w+\.so\.\d+", said)))
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", said)}
    return f"glibc {'.'.join(map(str, max(versions)))} ({fits}), {', '.join(libraries)}"


def of_macos(library: Path) -> str:
    """What a macOS library needs, if it is one that Python on Apple silicon loads."""
    from macholib.MachO import MachO

    (header,) = MachO(str(library)).headers
    wrong = []
    if (header.header.cputype, header.header.filetype) != (ARM64, DYLIB):
        wrong.append(f"processor {header.header.cputype:#x}, file type {header.header.filetype}")
    commands: dict[str, Any] = {command.get_cmd_name(): body for command, body, _ in header.commands}
    built = commands.get("LC_BUILD_VERSION")
    oldest = built and _version(int(built.minos))
    if oldest != OLDEST_MACOS:
        wrong.append(f"oldest system {oldest}")
    if "LC_CODE_SIGNATURE" not in commands:
        wrong.append("no signature, which Apple silicon asks for")
    needed = [name for _, kind, name in header.walkRelocatables() if name not in OF_MACOS and "_native" not in name]
    if needed or wrong:
        sys.exit(f"{library.name}: {wrong}, needs {needed}")
    return f"macOS {'.'.join(map(str, OLDEST_MACOS))}, libSystem"


def of_windows(library: Path) -> str:
    """What a Windows library needs, if it is one that every Python from 3.10 on loads on x86-64."""
    shown = subprocess.run(["objdump", "-p", str(library)], check=True, text=True, capture_output=True).stdout
    needed = sorted(set(re.findall(r"DLL Name: (\S+)", shown)))
    others = [name for name in needed if name not in OF_WINDOWS and not name.startswith("api-ms-win-crt-")]
    if "pei-x86-64" not in shown or "python3.dll" not in needed or others or "PyInit__native" not in shown:
        sys.exit(f"{library.name} needs {needed}:\n{shown}")
    return "Windows 10, python3.dll"


def _version(packed: int) -> tuple[int, int]:
    return packed >> 16, packed >> 8 & 0xFF


def table(rows: list[dict[str, str]]) -> str:
    """Return rows as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(page: Path, text: str) -> None:
    """Put ``text`` between the two comments of ``page`` that say who writes there."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")

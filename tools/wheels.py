"""Build the sdist and, out of it, a wheel for every platform that can be built for here; check and try them.

    python tools/wheels.py [linux-x86_64] [linux-aarch64] [macos-arm64] [free-threaded] [windows-x86_64]
        [--page FILE] [--release]

PyPI's ziglang compiles for all of them: its clang comes with the C libraries' symbols of old systems. Everything is
written to build/platforms; `--page` puts the table of wheels into a page, `--release` insists on the project's address.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import inspection
import windows

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "platforms"
BORROWED = ROOT / ".venv" / "bin" / "python"  # has torch and wrapt
SMOKE = ROOT / "tests" / "platforms" / "smoke.py"
THREADS = ROOT / "tests" / "platforms" / "free_threaded.py"


@dataclass(frozen=True)
class Target:
    """What a wheel is for: as zig, CMake and the wheel's name call it; which Python builds it; what runs it here."""

    zig: str
    system: str
    processor: str
    platform: str
    python: str = sys.executable
    abi: str = "cp310-abi3"
    listed: bool = True  # built where nobody names a platform


TARGETS = {
    "linux-x86_64": Target("x86_64-linux-gnu.2.28", "Linux", "x86_64", "manylinux_2_28_x86_64"),
    "linux-aarch64": Target("aarch64-linux-gnu.2.28", "Linux", "aarch64", "manylinux_2_28_aarch64"),
    "macos-arm64": Target("aarch64-macos.11.0", "Darwin", "arm64", "macosx_11_0_arm64"),
    "free-threaded": Target(
        "x86_64-linux-gnu.2.28",
        "Linux",
        "x86_64",
        "manylinux_2_28_x86_64",
        os.environ.get("FREE_THREADED", str(WORK / "python3.13t" / "bin" / "python3.13t")),
        "cp313-cp313t",
    ),
    # zig would compile a C++ library first, of which nothing is used.
    "windows-x86_64": Target("x86_64-windows-gnu -nostdlib++", "Windows", "AMD64", "win_amd64", listed=False),
}

# No macOS linker of zig's makes bundles; Python loads a dylib as well. And zig's names of processors have no dashes.
COMPILER = """#!/bin/sh
for argument in "$@"; do
  shift
  case $argument in
    -march=x86-64 | -Wl,-headerpad_max_install_names) ;;
    -bundle) set -- "$@" -dynamiclib -Wl,-install_name,@rpath/_native.abi3.so ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec nice "{python}" -m ziglang c++ -target {target} -s "$@"
"""
TOOL = '#!/bin/sh\nexec "{python}" -m ziglang {name} "$@"\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TARGETS))
    parser.add_argument("--page", type=Path)
    parser.add_argument("--release", action="store_true", help="fail where the metadata has no project address")
    options = parser.parse_args()
    began = time.monotonic()
    names = options.names or [name for name, target in TARGETS.items() if target.listed]
    source = sdist(WORK / "dist", options.release)
    rows = [one(name, source, WORK / "dist") for name in names]
    table = inspection.table(rows)
    print(f"\n{table}\n\n{time.monotonic() - began:.0f} seconds")
    if options.page:
        inspection.write(options.page, table)
    return 0


def sdist(output: Path, release: bool) -> Path:
    """Build and check the sdist; return the folder it was unpacked to, from which the wheels are built."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.tar.gz"):
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", output, ROOT)
    (archive,) = output.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", archive)
    unpacked = WORK / "source"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    inspection.check_metadata((folder / "PKG-INFO").read_text("utf-8"), release)
    return folder


def one(name: str, source: Path, output: Path) -> dict[str, str]:
    """Build, check and try one wheel; return its row of the table."""
    target = TARGETS[name]
    print(f"\n== {name}", flush=True)
    for old in output.glob(f"*-{target.abi}-{target.platform}.whl"):
        old.unlink()
    shutil.rmtree(WORK / "cmake" / name, ignore_errors=True)  # an sdist's files are all of one old date
    run(
        target.python if target.python == sys.executable else helped(target.python),
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", output),
        *(f"-Cwheel.tags={target.abi}-{target.platform}", f"-Cbuild-dir={WORK / 'cmake' / name}", source),
        **cross(name, target),
    )
    (wheel,) = output.glob(f"*-{target.abi}-{target.platform}.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    run(Path(sys.executable).with_name("check-wheel-contents"), wheel)
    if target.abi.endswith("abi3"):
        run(Path(sys.executable).with_name("abi3audit"), "--strict", "--report", wheel)
    row = inspection.look(wheel, target.system)
    row["tried here"] = tried(name, wheel)
    return row


def cross(name: str, target: Target) -> dict[str, str]:
    """The environment of a build: a compiler for ``target``, by its CMake toolchain file."""
    folder = WORK / "zig" / name
    folder.mkdir(parents=True, exist_ok=True)
    scripts = {"c++": COMPILER.format(python=sys.executable, target=target.zig)}
    scripts |= {tool: TOOL.format(python=sys.executable, name=tool) for tool in ("ar", "ranlib", "rc")}
    for script, text in scripts.items():
        (folder / script).write_text(text)
        (folder / script).chmod(0o755)
    return {
        "CMAKE_TOOLCHAIN_FILE": str(ROOT / "tools" / "zig.cmake"),
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("JOBS", "1"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "UPCAST_ZIG": str(folder),
        "UPCAST_SYSTEM": target.system,
        **({"UPCAST_WINDOWS_PYTHON": str(windows.prepare(WORK / "windows"))} if target.system == "Windows" else {}),
        "UPCAST_PROCESSOR": target.processor,
    }


def helped(python: str) -> str:
    """An environment of another Python with what builds wheels; its interpreter."""
    folder = WORK / "tools-free-threaded"
    if not (folder / "bin" / "python").exists():
        run(python, "-m", "venv", folder)
        run(folder / "bin" / "python", "-m", "pip", "--quiet", "install", "build", "scikit-build-core==1.1.2")
    return str(folder / "bin" / "python")


def tried(name: str, wheel: Path) -> str:
    """Install the wheel into an empty environment, and use it there, if this machine can run it."""
    if name == "free-threaded":
        python = empty(name, TARGETS[name].python, wheel)
        run(python, THREADS)
        return "installed; the native module, from many threads, without torch"
    if TARGETS[name].platform.split("_", 3)[-1] != os.uname().machine or TARGETS[name].system != os.uname().sysname:
        return "no: `make test-aarch64` does" if name == "linux-aarch64" else "no"
    python = empty(name, sys.executable, wheel)
    torch = subprocess.check_output([BORROWED, "-c", "import torch; print(torch.__file__)"], text=True).strip()
    (site,) = python.parents[1].glob("lib/python3*/site-packages")
    (site / "00_torch.pth").write_text(f"{Path(torch).parents[1]}\n")  # before upcast.pth, which looks for wrapt
    run(python, SMOKE, LD_BIND_NOW="1")
    return "installed into an empty environment; smoke test"


def empty(name: str, python: str, wheel: Path) -> Path:
    """A new environment that holds only the wheel; its interpreter."""
    folder = WORK / "empty" / name
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", wheel)
    return folder / "bin" / "python"


def run(*command: object, **variables: str) -> None:
    """Run a command; what it says is shown where it fails."""
    done = subprocess.run(
        [*map(str, command)], check=False, env=os.environ | variables, text=True, cwd=WORK, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    print("  " + " ".join(str(part) for part in command[:4] if "/" not in str(part)) + ": fine", flush=True)


if __name__ == "__main__":
    sys.exit(main())

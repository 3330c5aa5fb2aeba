"""The package with torch under a free-threaded Python: the tests that need no other library.

    python tools/without_gil.py PYTHON WHEEL [pytest's arguments]

The environment is build/platforms/without-gil; 5 GB, most of it the CUDA libraries that torch asks for.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "platforms" / "without-gil"
REQUIREMENTS = ROOT / "tests" / "platforms" / "free_threaded.txt"
# Nothing of ours, and nothing that upcast imports, may switch the GIL on.
STAYS_OFF = """
import sys, torch, upcast
from upcast import kernels
model = upcast.patch(torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 4)))
model(torch.arange(3)).sum().backward()
assert kernels.name() == "native" and not sys._is_gil_enabled()
"""


def main() -> int:
    interpreter, wheel = (str(Path(path).absolute()) for path in sys.argv[1:3])
    arguments = sys.argv[3:]
    python = str(WORK / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    if not Path(python).exists():
        run(interpreter, "-m", "venv", str(WORK))
    run(*pip, "--only-binary", ":all:", "--requirement", str(REQUIREMENTS))
    run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel)
    run(python, "-W", "error", "-c", STAYS_OFF)
    run(*pip[:-1], "uninstall", "--yes", "triton")  # torch's optimizers import it, and it switches the GIL on
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(tests, check=False, cwd=ROOT, env=os.environ | {"OMP_WAIT_POLICY": "passive"}).returncode


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, cwd=WORK.parent, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())

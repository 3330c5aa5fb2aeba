"""``make test-versions``: every row of the matrix in an environment of its own; docs/versions.md is what came out.

``python -m tests.versions [ROW ...]`` runs some rows, such as ``litgpt-0.4.11`` or ``torch`` for all of torch; the
others keep what their last run said. Environments lie under build/versions and borrow everything else from .venv.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.versions import page
from tests.versions.matrix import ROWS, Row

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "versions"
RESULTS = BUILD / "results.json"


def main(asked: list[str]) -> int:
    """Run the rows, write the page; return 1 if one failed."""
    failed = []
    for row in ROWS:
        if asked and row.name not in asked and row.library not in asked:
            continue
        print(f"{row.name} ...", end=" ", flush=True)
        start = time.monotonic()
        result = run(row)
        result["whole"] = time.monotonic() - start
        print(f"{'failed' if 'error' in result else 'passed'}, {result['whole']:.0f} s", flush=True)
        if "error" in result:
            failed.append(row.name)
            print(result["error"])
        _keep(row, result)
    print(page.table(_results()))
    return 1 if failed else 0


def _results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def _keep(row: Row, result: dict[str, Any]) -> None:
    """Add a result to those of all runs, and to the page."""
    BUILD.mkdir(parents=True, exist_ok=True)
    results = {**_results(), row.name: result}  # read again: another run may be at other rows
    RESULTS.write_text(json.dumps(results, indent=1))
    page.write(results)


def run(row: Row) -> dict[str, Any]:
    """Return what the smoke said in the row's environment, or its error."""
    folder = BUILD / row.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        installed = _environment(row, folder)
        if installed.returncode:
            return {"error": installed.stderr[-3000:]}
        done = _python(folder, "-m", "tests.versions.smoke", row.library)
        if done.returncode:
            return {"error": done.stderr[-3000:]}
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    except subprocess.TimeoutExpired as error:
        return {"error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # of torch, gigabytes


def _environment(row: Row, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Make an environment that has everything of this one, but for what is installed into it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    borrowed = "".join(f"site.addsitedir({path!r}); " for path in site.getsitepackages())
    (packages / "zz_borrowed.pth").write_text(f"import site; {borrowed}\n")
    options = ["--no-deps"] if row.alone else []
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir")
    return _python(folder, *pip, "--ignore-installed" if row.alone else "--upgrade", *options, *row.packages)


def _python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    return subprocess.run(
        [folder / "bin" / "python", *arguments],
        env={**clean, "UPCAST_VERBOSE": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

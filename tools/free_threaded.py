"""A free-threaded CPython 3.13, compiled out of Debian's source package: no registry here has one ready-made.

    python tools/free_threaded.py FOLDER

Some minutes on one core. `FREE_THREADED=path/to/python3.13t make wheels` takes one that you have.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from debian import Debian

SUITE, PACKAGE = "trixie", "python3.13"


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    if (folder / "bin" / "python3.13t").exists():
        return
    work = folder.with_name(f"{folder.name}-build")
    archive = Debian(work / "apt", SUITE, "amd64").source(PACKAGE)
    with tarfile.open(archive) as file:
        file.extractall(work)
    (source,) = work.glob("Python-*")
    jobs = f"-j{os.environ.get('JOBS', '1')}"
    for command in (
        ["./configure", "--quiet", "--disable-gil", f"--prefix={folder}", "--disable-test-modules"],
        ["make", "--silent", jobs],
        ["make", "--silent", "install"],
    ):
        with (work / "log").open("a") as log:
            done = subprocess.run(["nice", *command], check=False, cwd=source, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {work / 'log'}")


if __name__ == "__main__":
    main()

"""Debian's packages without being root and without touching the system: lists and caches of our own.

apt-get resolves and downloads with an empty state, for any architecture; dpkg unpacks. Nothing is installed.
"""

import os
import re
import subprocess
from pathlib import Path

SOURCES = Path("/etc/apt")
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"

CONFIG = """\
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::parts "-";
Dir::Etc::preferencesparts "-";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
"""


def mirror() -> str:
    """Return the mirror of this system's own lists, or DEBIAN_MIRROR."""
    named = os.environ.get("DEBIAN_MIRROR", "")
    lists = [*SOURCES.glob("sources.list.d/*"), *SOURCES.glob("sources.list")]
    found = [url for each in lists for url in re.findall(r"https?://\S+/debian/?(?=\s)", each.read_text() + "\n")]
    if not (named or found):
        raise SystemExit("no Debian mirror in /etc/apt; set DEBIAN_MIRROR to the address of one")
    return named or str(found[0])


class Debian:
    """One suite for one architecture, with its lists in ``folder``."""

    def __init__(self, folder: Path, suite: str, architecture: str) -> None:
        self.folder = folder
        self.config = folder / "apt.conf"
        for each in ("state/lists/partial", "cache/archives/partial"):
            (folder / each).mkdir(parents=True, exist_ok=True)
        (folder / "state" / "status").touch()
        lines = [f"{kind} [signed-by={KEYS}] {mirror()} {suite} main" for kind in ("deb", "deb-src")]
        (folder / "sources.list").write_text("\n".join(lines) + "\n")
        self.config.write_text(CONFIG.format(architecture=architecture, folder=folder))
        self._apt("update")

    def unpack(self, root: Path, *packages: str) -> None:
        """Unpack packages, and what they depend on, into ``root``."""
        self._apt("install", "--download-only", "--yes", *packages)
        root.mkdir(parents=True, exist_ok=True)
        for each in sorted((self.folder / "cache" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", str(each), str(root)], check=True)

    def source(self, package: str) -> Path:
        """Download a source package; return its original archive."""
        self._apt("source", "--download-only", package, cwd=self.folder)
        (archive,) = self.folder.glob(f"{package}_*.orig.tar.*[!c]")
        return archive

    def _apt(self, *arguments: str, cwd: Path | None = None) -> None:
        command = ["apt-get", "--quiet", "--quiet", "--config-file", str(self.config), *arguments]
        done = subprocess.run(command, check=False, cwd=cwd, text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

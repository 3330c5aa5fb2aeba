"""What the wheel's metadata says beside pyproject.toml: the project's address, and the README with absolute links.

The address is not in the repository: ``UPCAST_REPOSITORY`` names it (GitHub's workflows set it from their own), and an
sdist keeps it. Without it there are no links: a picture is its text, and so is a link to another page.
"""

import os
import re
from email.parser import Parser
from pathlib import Path
from typing import Any

PAGES = {"Changelog": "CHANGELOG.md", "Documentation": "docs/index.md", "Security": "SECURITY.md"}
# ![text](target) and [text](target), where target is a file of the repository
LINK = re.compile(r"(!?)\[([^]]+)\]\((?!https?:|#|mailto:)([^)]+)\)")


def dynamic_metadata(field: str, settings: dict[str, Any], project: object = None) -> Any:
    """Return the value of ``field``: ``readme`` or ``urls``."""
    if settings or field not in ("readme", "urls"):
        raise ValueError(f"{field} with {settings}: only readme and urls, without settings, are known here")
    address = _address()
    if field == "urls":
        return urls(address)
    return {"content-type": "text/markdown", "text": readme(Path("README.md").read_text("utf-8"), address)}


def urls(address: str | None) -> dict[str, str]:
    """Return the project's links, of which there are none without an address."""
    if not address:
        return {}
    pages = {name: f"{address}/blob/main/{page}" for name, page in PAGES.items()}
    return {"Homepage": address, "Repository": address, "Issues": f"{address}/issues", **pages}


def readme(text: str, address: str | None) -> str:
    """Return ``text`` with absolute links in place of relative ones."""

    def absolute(link: re.Match[str]) -> str:
        picture, name, target = link.groups()
        if not address:
            return f"*{name}*" if picture else name
        return f"{picture}[{name}]({address}/{'raw' if picture else 'blob'}/main/{target})"

    return LINK.sub(absolute, text)


def _address() -> str | None:
    if address := os.environ.get("UPCAST_REPOSITORY", "").rstrip("/"):
        return address
    kept = Path("PKG-INFO")  # of an sdist
    links = Parser().parsestr(kept.read_text("utf-8")).get_all("Project-URL", []) if kept.is_file() else []
    return dict(link.split(", ", 1) for link in links).get("Homepage")

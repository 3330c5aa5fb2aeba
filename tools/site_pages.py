"""Pages of the documentation that no file in docs/ is: notebooks, and the pages at the top of the repository.

MkDocs calls these functions while it builds the site. A notebook becomes a page of Markdown with its outputs: its links
are checked like those of every other page, its pictures have alternative texts, and nothing is run.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
PROJECT = "project"  # the folder of the site in which these pages lie
TERMINAL = re.compile(r"\x1b\[[0-9;]*m")  # colours


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook and for each page at the top of the repository."""
    for name in TOP:
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, f"{PROJECT}/{name}", content=seen_from(text, PROJECT)))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            for path, content in notebook(Path(str(file.abs_src_path)), file.src_uri).items():
                files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links from docs/ to the top of the repository lead to the site's pages; no menu beside the front page."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    up = "../" * page.file.src_uri.count("/")
    return re.sub(rf"\]\((?:\.\./)+({'|'.join(TOP)})", rf"]({up}{PROJECT}/\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Let a click on a picture show it in its full size."""
    return re.sub(r'(<img [^>]*src="([^"]+)"[^>]*>)', r'<a class="picture" href="\2">\1</a>', html)


def seen_from(text: str, folder: str) -> str:
    """Return a page of the repository's top with links as they are from ``folder`` in docs/."""
    up = "../" * (folder.count("/") + 1)
    return re.sub(r"\]\(docs/", f"]({up}", text).replace("](README.md)", f"]({up}index.md)")


def notebook(path: Path, uri: str) -> dict[str, str | bytes]:
    """Return path -> content of the page that a notebook is, and of the pictures in it."""
    files: dict[str, str | bytes] = {}
    parts = [f"[Download this notebook]({path.name}){{ .md-button download }}"]
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for place, output in enumerate(cell["outputs"]):
            name = f"{path.stem}-{number}-{place}.png"
            shown, picture = _output(output, name, cell["metadata"].get("alt", ""))
            parts.append(shown)
            if picture:
                files[str(Path(uri).with_name(name).as_posix())] = picture
    title, _, rest = "\n\n".join(parts[1:]).partition("\n")
    files[uri.removesuffix(".ipynb") + ".md"] = f"{title}\n\n{parts[0]}\n{rest}\n"
    return files


def _output(output: dict[str, Any], name: str, alt: str) -> tuple[str, bytes]:
    """Return the Markdown of one output of a cell, and its picture."""
    if output["output_type"] == "stream":
        text = "".join(output["text"])
        prose = output["name"] == "stderr" or "  " not in text  # no columns: long lines may be broken
        return _text(text, "{.text .said}" if prose else "text"), b""
    data = output["data"]
    if "image/png" in data:
        return f"![{alt}]({name})", base64.b64decode(data["image/png"])
    return _text("".join(data["text/plain"])), b""


def _text(text: str, language: str = "text") -> str:
    return f"```{language}\n{TERMINAL.sub('', text).rstrip()}\n```"

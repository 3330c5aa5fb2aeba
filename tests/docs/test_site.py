"""The site builds strictly: what leads nowhere, or is in no menu, is an error. Notebooks show their outputs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

QUIET = {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about a version that is not here


def build(folder: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)],
        cwd=folder,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    built = build(ROOT, output)
    assert built.returncode == 0, built.stdout + built.stderr
    return output


def test_notebooks_are_pages_with_their_outputs(site: Path) -> None:
    notebooks = sorted((DOCS / "tutorials").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        page = (site / "tutorials" / f"{notebook.stem}.html").read_text("utf-8")
        assert "Download this notebook" in page
        assert page.count('class="highlight"') > 3  # code and what it printed


def test_every_public_name_is_documented_with_its_example(site: Path) -> None:
    import upcast

    page = (site / "api.html").read_text("utf-8")
    assert [name for name in upcast.__all__ if f'id="upcast.{name}"' not in page] == []
    assert page.count("Examples:") == len(upcast.__all__)


def test_pictures_have_texts_and_nothing_comes_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert re.findall(r'<img (?![^>]*alt="[^"]{15})[^>]*>', text) == [], page
        assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//[^"]+"', text) == [], page


@pytest.mark.parametrize("text", ["[away](nowhere.md)", "[away](#nowhere)", "![a picture of nothing](nowhere.png)"])
def test_what_leads_nowhere_is_an_error(text: str, tmp_path: Path) -> None:
    settings = yaml.safe_load(re.sub(r"\n(hooks|plugins|nav|theme):.*?(?=\n\w|\Z)", "", _settings(), flags=re.DOTALL))
    (tmp_path / "mkdocs.yml").write_text(yaml.dump(settings))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{text}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0
    (tmp_path / "docs" / "index.md").write_text("# A page\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0


def _settings() -> str:
    return (ROOT / "mkdocs.yml").read_text("utf-8")

"""What the published metadata says: links of the README, the project's address, its name and version."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import upcast
from upcast.core import about

ROOT = Path(__file__).parents[2]
ADDRESS = "https://host.example/owner/name"

LINKS = {  # as written -> with an address, without one
    "![a picture](docs/a.png)": (f"![a picture]({ADDRESS}/raw/main/docs/a.png)", "*a picture*"),
    "[a page](docs/a.md)": (f"[a page]({ADDRESS}/blob/main/docs/a.md)", "a page"),
    "[elsewhere](https://pytorch.org)": ("[elsewhere](https://pytorch.org)",) * 2,
    "[below](#install)": ("[below](#install)",) * 2,
}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module that the build backend loads."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("UPCAST_REPOSITORY", raising=False)
    spec = importlib.util.spec_from_file_location("metadata_provider", ROOT / "tools" / "metadata_provider.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("link", LINKS)
def test_links_are_absolute_or_none(provider: ModuleType, link: str) -> None:
    assert (provider.readme(link, ADDRESS), provider.readme(link, None)) == LINKS[link]


def test_an_address_is_given_or_nothing_is_made_up(provider: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provider.dynamic_metadata("urls", {}) == {}
    assert "](docs/" not in provider.dynamic_metadata("readme", {})["text"]
    monkeypatch.setenv("UPCAST_REPOSITORY", f"{ADDRESS}/")
    assert provider.dynamic_metadata("urls", {})["Homepage"] == ADDRESS
    assert f"]({ADDRESS}/raw/main/docs/benchmark.png)" in provider.dynamic_metadata("readme", {})["text"]
    for page in provider.PAGES.values():
        assert (ROOT / page).is_file()


def test_an_sdist_keeps_the_address(provider: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PKG-INFO").write_text(f"Name: x\nProject-URL: Homepage, {ADDRESS}\n\ntext\n")
    assert provider.dynamic_metadata("urls", {})["Issues"] == f"{ADDRESS}/issues"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_project_is_published_under_its_own_name() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == about.DISTRIBUTION != "upcast"
    assert upcast.__version__ == about.VERSION
    assert all("upcast" in script for script in project["project"]["scripts"])

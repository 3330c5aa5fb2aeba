"""The list of public names is what there is, and links in the documentation lead somewhere."""

import re
from pathlib import Path

import pytest

import upcast
from upcast.analysis.result import Result

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text()
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


def test_every_public_name_has_its_row() -> None:
    rows = [line.split("|") for line in API.splitlines() if line.startswith("| `")]
    first = {re.match(r" `(\w+)", row[1]).group(1) for row in rows}  # type: ignore[union-attr]
    results = {re.sub(r"\W", "", row[3]) for row in rows if len(row) > 4} - {""}
    assert first | results == {*upcast.__all__}
    assert results == {name for name in upcast.__all__ if _is_result(name)}


def _is_result(name: str) -> bool:
    value = getattr(upcast, name)
    return isinstance(value, type) and issubclass(value, Result)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|#|mailto)([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / link).exists(), link

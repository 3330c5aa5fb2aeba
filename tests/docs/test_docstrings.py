"""Every public name has an example, and it gives what it says."""

import doctest
import shutil
from pathlib import Path

import pytest
import torch

import upcast
from tests.docs import stand_ins

pytest.importorskip("diffusers")
pytest.importorskip("lightning")

FLAGS = doctest.REPORT_NDIFF | doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    stand_ins.write(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's
@pytest.mark.parametrize("name", upcast.__all__)
def test_the_example_of(name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    value = getattr(upcast, name)
    example = doctest.DocTestParser().get_doctest(
        value.__doc__ or "", {"upcast": upcast, "torch": torch, name: value}, name, None, None
    )
    assert "Examples:" in (value.__doc__ or "")
    assert example.examples
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append).failed
    assert not failed, "".join(said)

"""The folders of python -m upcast convert: whose they are, who may write them, and checkpoints that have no twin."""

import importlib
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import upcast
from tests.stop_points import content, write_source
from upcast.checkpoint import conversion
from upcast.checkpoint.output_folder import Partial
from upcast.cli.main import main
from upcast.core import file_lock
from upcast.integrations.litgpt import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def interrupted(source: Path) -> Path:
    """Leave a folder in the middle of the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_verify", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source)
    return partial_of(source)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def partial_of(source: Path) -> Path:
    return source.with_name("source-float16.partial")


# --- what is not ours -------------------------------------------------------------------------------------------------


def thesis(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "thesis.tex").write_text("x")


def link(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        other = folder.with_name("other")
        other.mkdir()
        (other / "lit_model.pth").write_text("theirs")
        folder.with_name(name).symlink_to(other)

    return make


def inner_link(folder: Path) -> None:
    link("link")(folder)
    (folder / "lit_model.pth").unlink()
    (folder / "lit_model.pth").symlink_to(folder.with_name("other") / "lit_model.pth")


def lock_of(content: str) -> Callable[[Path], object]:
    return lambda folder: folder.with_name(f"{folder.name}.lock").write_text(content)


NAME = "source-float16.partial"
FOREIGN: list[tuple[str, bool, Callable[[Path], object], str]] = [
    ("a folder of files", False, thesis, r"thesis\.tex.*left as it is"),
    ("a file among ours", True, thesis, r"thesis\.tex.*left as it is"),
    ("a folder among ours", True, lambda folder: (folder / "mine").mkdir(), "mine"),
    ("a folder named like ours", True, lambda folder: (folder / "upcast.new").mkdir(), r"upcast\.new"),
    ("a model", False, write_source, r"lit_model\.pth, model_config\.yaml"),
    ("a link", False, link(NAME), "is a link"),
    ("a link that leads nowhere", False, lambda folder: folder.symlink_to("nowhere"), "is a link"),
    ("a link in place of our file", True, inner_link, r"lit_model\.pth"),
    ("a file", False, lambda folder: folder.write_text("x"), "is not a folder"),
    ("our plan, damaged", True, lambda folder: (folder / "upcast.plan.json").write_text("{"), r"upcast\.plan\.json"),
    ("a lock with content", False, lock_of("1234"), r"partial\.lock is not upcast's"),
    ("a lock that is a link", False, link(f"{NAME}.lock"), r"partial\.lock is a link"),
]


@pytest.mark.parametrize(("started", "make", "message"), [pytest.param(s, m, t, id=i) for i, s, m, t in FOREIGN])
def test_what_is_not_ours_is_left(source: Path, started: bool, make: Callable[[Path], object], message: str) -> None:
    if started:
        interrupted(source)
    make(partial_of(source))
    before = content(source.parent)
    with pytest.raises(upcast.UpcastError, match=f"{message}.*Move it away"):
        convert.convert(source)
    assert content(source.parent) == before


def test_what_another_checkpoint_left_is_replaced(source: Path, tmp_path: Path) -> None:
    interrupted(source)
    state = torch.load(source / "lit_model.pth")
    torch.save({name: 2 * tensor for name, tensor in state.items()}, source / "lit_model.pth")
    (source / "tokenizer.json").rename(source / "tokenizer.model")  # a file beside it that is gone, and a new one
    convert.convert(source)
    convert.convert(source, tmp_path / "anew")
    assert content(tmp_path / "source-float16") == content(tmp_path / "anew")
    assert sorted(os.listdir(tmp_path)) == ["anew", "source", "source-float16"]


@pytest.mark.parametrize("whole", [0, 1])
def test_files_beside_the_weights_are_as_they_are_at_the_end(
    source: Path, tmp_path: Path, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that comes late is in the plan before it is in the folder, or a run stopped then could not go on."""
    interrupted(source)
    copied: list[Path] = []

    def copy(partial: Partial, path: Path) -> None:
        if len(copied) == whole:
            (partial.folder / path.name).write_text("half a file")
            raise KeyboardInterrupt
        copied.append(path)
        real(partial, path)

    (source / "prompt_style.yaml").write_text("plain")
    real = Partial.copy
    with monkeypatch.context() as patch:
        patch.setattr(Partial, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source)
    (source / "prompt_style.yaml").unlink()
    convert.convert(source)
    twin = ["lit_model.pth", "model_config.yaml", "tokenizer.json", "upcast.json"]
    assert sorted(os.listdir(tmp_path / "source-float16")) == twin
    assert (tmp_path / "source-float16" / "model_config.yaml").read_text() == "name: small\n"


def test_other_weights_of_the_same_size_and_time_are_no_twin(source: Path) -> None:
    convert.convert(source)
    weights, twin = source / "lit_model.pth", content(source.with_name("source-float16"))
    before, state = weights.stat(), torch.load(weights)
    torch.save({name: 2 * tensor for name, tensor in state.items()}, weights)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    with pytest.raises(upcast.UpcastError, match="is not a float16 copy of this checkpoint as it is now"):
        convert.convert(source)
    assert content(source.with_name("source-float16")) == twin


def test_a_twin_with_other_files_beside_it_says_so(source: Path) -> None:
    convert.convert(source)
    assert convert.convert(source).endswith("nothing to do")
    (source / "model_config.yaml").write_text("name: large\n")
    (source / "generation_config.json").write_text("{}")
    assert convert.convert(source).endswith("Not as in the checkpoint: generation_config.json, model_config.yaml")


# --- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "weights"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o444), (0o555, 0o400)])
def test_the_twin_is_as_open_as_its_source(source: Path, folder: int, weights: int) -> None:
    (source / "lit_model.pth").chmod(weights)
    source.chmod(folder)
    assert stat.S_IMODE(interrupted(source).stat().st_mode) == 0o700
    convert.convert(source)
    twin = source.with_name("source-float16")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [twin, *twin.iterdir()]}
    beside = {path.name: stat.S_IMODE(path.stat().st_mode) for path in source.iterdir()}
    assert modes == {**beside, twin.name: folder | 0o700, "lit_model.pth": weights | 0o600, "upcast.json": weights}


def test_a_folder_made_beforehand_keeps_its_permissions(source: Path) -> None:
    source.with_name("source-float16").mkdir(mode=0o700)
    convert.convert(source)
    assert stat.S_IMODE(source.with_name("source-float16").stat().st_mode) == 0o700


# --- two at once ------------------------------------------------------------------------------------------------------


def test_the_second_run_is_told_before_it_touches_anything(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def verify(*arguments: Any) -> None:  # in the middle of the first run
        before = content(source.parent)
        with pytest.raises(upcast.UpcastError, match="another process is writing") as caught:
            convert.convert(source)
        seen.append(str(caught.value))
        assert content(source.parent) == before
        real(*arguments)

    real = conversion._verify
    monkeypatch.setattr(conversion, "_verify", verify)
    convert.convert(source)
    assert len(seen) == 1
    assert sorted(os.listdir(source.parent)) == ["source", "source-float16"]


def test_a_run_that_ended_after_the_second_one_had_looked_is_found(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Partial.alone

    def first(partial: Partial) -> Any:
        monkeypatch.setattr(Partial, "alone", alone)
        assert "verified" in convert.convert(source)
        return partial.alone()

    monkeypatch.setattr(Partial, "alone", first)
    assert "is there already, converted from this checkpoint" in convert.convert(source)
    assert sorted(os.listdir(source.parent)) == ["source", "source-float16"]


def test_a_lock_that_its_holder_deleted_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, path = file_lock._take, tmp_path / "lock"

    def late(*arguments: Any) -> None:  # its holder ended between our opening and our locking
        monkeypatch.setattr(file_lock, "_take", take)
        path.unlink()
        take(*arguments)

    monkeypatch.setattr(file_lock, "_take", late)
    with file_lock.held(path, "busy"):
        with pytest.raises(upcast.UpcastError, match="busy"), file_lock.held(path, "busy"):
            pass
        assert path.exists()
    assert not path.exists()


def test_the_lock_of_a_run_that_was_killed_goes_with_the_next_one(source: Path) -> None:
    for said in ("verified", "is there already"):  # killed before the twin had its name, and after
        partial_of(source).with_name(f"{NAME}.lock").touch()
        assert said in convert.convert(source)
        assert sorted(os.listdir(source.parent)) == ["source", "source-float16"]


def test_where_there_is_no_fcntl(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: fcntl cannot be imported, and msvcrt locks."""
    fcntl = pytest.importorskip("fcntl")
    windows = ModuleType("msvcrt")
    windows.LK_NBLCK = 2
    windows.locking = lambda handle, how, count: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    litgpt = ("integrations.litgpt.convert", "integrations.litgpt.convert_source")
    for name in (*litgpt, "checkpoint.conversion", "checkpoint.output_folder", "core.file_lock"):
        package, _, module = f"upcast.{name}".rpartition(".")
        monkeypatch.setattr(sys.modules[package], module, sys.modules[f"upcast.{name}"])  # an import sets it
        monkeypatch.delitem(sys.modules, f"upcast.{name}")
    anew = importlib.import_module("upcast.integrations.litgpt.convert")
    lock = importlib.import_module("upcast.core.file_lock")
    assert anew is not convert
    held = lock.held(partial_of(source).with_name(f"{NAME}.lock"), "busy")
    with held, pytest.raises(upcast.UpcastError, match="another process is writing"):
        anew.convert(source)
    assert "verified" in anew.convert(source)
    assert sorted(os.listdir(source.parent)) == ["source", "source-float16"]


# --- no twin ----------------------------------------------------------------------------------------------------------

WEIGHT = torch.arange(12.0).view(3, 4)
USELESS: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    ("sparse", lambda: {"a": WEIGHT, "b": WEIGHT.to_sparse()}, "b is a sparse_coo tensor; .* dense tensors"),
    ("csr", lambda: {"b": WEIGHT.to_sparse_csr()}, "b is a sparse_csr tensor"),
    ("meta", lambda: {"a": WEIGHT, "b": torch.empty(2, 2, device="meta")}, "b is a meta tensor"),
    ("quantized", lambda: {"b": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}, "b is a quantized tensor"),
    ("vectors", lambda: {"a": torch.zeros(3), "b": torch.zeros(2).bfloat16()}, "no weight that float16 can hold"),
    ("integers", lambda: {"a": WEIGHT.long()}, "no weight that float16 can hold"),
    ("out of range", lambda: {"a": 1e6 * (1 + WEIGHT)}, "no weight that float16 can hold"),
    ("no tensors", dict, "no weight that float16 can hold"),
]


@pytest.mark.filterwarnings("ignore:Sparse|torch.quantize|.*deprecated")
@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "old format"])
@pytest.mark.parametrize(("state", "message"), [pytest.param(s, m, id=i) for i, s, m in USELESS])
def test_tensors_that_have_no_twin(
    source: Path, state: Callable[[], dict[str, Any]], message: str, legacy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state(), source / "lit_model.pth", _use_new_zipfile_serialization=not legacy)
    refused = "tensor" in message
    assert main(["convert", str(source)]) == 2 * refused
    said = capsys.readouterr()
    assert len((said.err if refused else said.out).strip().splitlines()) == 1
    assert [line for line in (said.err + said.out).splitlines() if re.search(message, line)]
    assert os.listdir(source.parent) == ["source"]


OUTPUTS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("in a file", lambda folder: folder / "tokenizer.json" / "twin", "tokenizer.json: "),
    ("of a long name", lambda folder: folder.with_name("a" * 253), "File name too long"),
    ("the root", lambda folder: Path(folder.anchor), "is there already, and is not a float16 copy"),
    ("a link to itself", lambda folder: folder.with_name("loop"), "loop"),
    ("with NUL", lambda folder: folder.with_name("a\0b"), "leads nowhere"),
    ("where a file system is mounted", lambda folder: folder.with_name("mounted"), "is a mount point"),
]


@pytest.mark.parametrize(("output", "message"), [pytest.param(o, m, id=i) for i, o, m in OUTPUTS])
def test_outputs_that_cannot_be(
    source: Path, output: Callable[[Path], Path], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.with_name("loop").symlink_to("loop")
    source.with_name("mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == source.with_name("mounted"))
    before = content(source.parent)
    with pytest.raises(upcast.UpcastError, match=f"{message}.*another folder with --output"):
        convert.convert(source, output(source))
    assert content(source.parent) == before


def test_an_interruption_is_one_line(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(conversion, "_verify", _interrupt)
    assert main(["convert", str(source)]) == 130
    assert capsys.readouterr().err.endswith("upcast: interrupted; the same command goes on from here\n")

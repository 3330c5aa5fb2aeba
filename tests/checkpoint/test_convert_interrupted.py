"""python -m upcast convert, stopped: at any line, by a full disk, by a loss of power; and what the next run does."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run
from tests.peak_memory import ROOT
from tests.stop_points import content, write_source
from upcast.checkpoint import output_folder, zip_writer
from upcast.integrations.litgpt import convert

PROGRAM = str(Path(__file__).parents[1].joinpath("stop_points.py"))
WAYS = ["kill", "interrupt", "full", "random"]
SOME = [(40, 0, way) for way in WAYS[:-1]]
EVERY = [pytest.param(40, 0, "random", marks=pytest.mark.slow)]
EVERY += [pytest.param(4, seed, way, marks=pytest.mark.slow) for way in WAYS for seed in range(4)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def wanted(source: Path, tmp_path: Path) -> list[tuple[str, int, bytes]]:
    """What an undisturbed run writes."""
    convert.convert(source, tmp_path / "undisturbed")
    return content(tmp_path / "undisturbed")


@pytest.fixture
def stopped(source: Path, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted when all tensors were written."""
    with monkeypatch.context() as patch:
        patch.setattr(zip_writer, "seal", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "twin")
    return tmp_path / "twin.partial"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stride", "seed", "way"), SOME + EVERY)
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, python_with_libraries: Run, stride: int, seed: int, way: str
) -> None:
    result = python_with_libraries(
        PROGRAM, str(tmp_path), way, str(stride), str(seed), PYTHONPATH=str(ROOT), UPCAST_VERBOSE="0"
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"[1-9]\d* stops\n", result.stdout), result.stdout


# --- what is left is damaged ------------------------------------------------------------------------------------------


def journal(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "upcast.journal").write_bytes(change((folder / "upcast.journal").read_bytes()))


def plan(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        whole = json.loads((folder / "upcast.plan.json").read_text())
        change(whole)
        (folder / "upcast.plan.json").write_text(json.dumps(whole))

    return write


def of_another_kind(line: bytes) -> bytes:
    """Lines whose checksums are right, and whose content is not."""
    return (
        line
        + output_folder.journal_line([1, 2]).encode()
        + output_folder.journal_line({"name": "a", "crc32": "x"}).encode()
    )


def lose(folder: Path) -> None:
    """As after a loss of power: the journal says more than the file holds."""
    place = zip_writer.places(folder / "lit_model.pth")[0]
    with (folder / "lit_model.pth").open("r+b") as file:
        file.seek(place.start)
        file.write(bytes(place.bytes))


DAMAGES: list[tuple[str, Callable[[Path], object], int]] = [
    ("nothing", lambda folder: None, 4),
    ("empty journal", journal(lambda _: b""), 0),
    ("no journal", lambda folder: (folder / "upcast.journal").unlink(), 0),
    ("cut journal", journal(lambda data: data[:-9]), 3),
    ("zeros in the journal", journal(lambda data: data + bytes(512)), 4),
    ("first line changed", journal(lambda data: data.replace(b'"flushed": 0', b'"flushed": 7', 1)), 3),
    ("a journal without checksums", journal(lambda data: re.sub(rb" \w{8}\n", b"\n", data)), 0),
    ("lines of another kind", journal(of_another_kind), 3),
    ("weights lost", lose, 4),
    ("weights gone", lambda folder: (folder / "lit_model.pth").unlink(), 0),
    ("weights cut", lambda folder: os.truncate(folder / "lit_model.pth", 900), 0),
    ("weights of another kind", lambda folder: (folder / "lit_model.pth").write_bytes(b"PK\x05\x06" * 99), 0),
    ("a plan of no tensors", plan(lambda whole: whole.update(tensors=None)), 0),
    ("a plan of other tensors", plan(lambda whole: whole["tensors"].pop()), 0),
    ("a plan with an unknown action", plan(lambda whole: whole["tensors"][0].update(action="burn")), 0),
    ("a plan of another version", plan(lambda whole: whole.update(upcast="0.0")), 0),
    ("a manifest that is none", lambda folder: (folder / "upcast.json").write_text("[]"), 4),
]


@pytest.mark.parametrize(("damage", "kept"), [pytest.param(d, k, id=i) for i, d, k in DAMAGES])
def test_what_is_damaged_is_written_again(
    source: Path, wanted: Any, stopped: Path, damage: Any, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(stopped)
    convert.convert(source, stopped.with_name("twin"))
    assert content(stopped.with_name("twin")) == wanted
    assert (f"going on with twin.partial: {kept} of 5" in capsys.readouterr().err) == bool(kept)
    assert not stopped.exists()


def test_a_run_stopped_after_its_manifest_only_needs_its_name(
    source: Path, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "twin")
    monkeypatch.setattr(convert, "write_half", None)  # nothing is rounded again
    text = convert.convert(source, tmp_path / "twin")
    assert content(tmp_path / "twin") == wanted
    assert "verified: 5 keys" in text


def test_an_interruption_leaves_nothing_in_torch(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving without numbers is a switch of torch's: left on, every later save and load would go without them."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization.skip_data, "__exit__", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(source, tmp_path / "twin")
    torch.save(torch.arange(5), tmp_path / "saved")
    assert torch.equal(torch.load(tmp_path / "saved"), torch.arange(5))


def test_what_is_read_back_must_be_what_was_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = zip_writer.seal
    monkeypatch.setattr(zip_writer, "seal", lambda path, crcs: (seal(path, crcs), lose(path.parent)))
    with pytest.raises(upcast.UpcastError, match=r"what was read back is not what was written .*Bad CRC-32"):
        convert.convert(source, tmp_path / "twin")
    assert os.listdir(tmp_path) == ["source"]


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_what_is_missing_on_a_full_disk_is_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
        with pytest.raises(upcast.UpcastError) as caught:
            convert.convert(source, tmp_path / "twin")
    needed, missing = re.findall(r"([\d,]+) bytes (?:more|are missing)", str(caught.value))
    assert int(needed.replace(",", "")) - int(missing.replace(",", "")) == 10_000
    assert os.listdir(tmp_path) == ["source"]
    convert.convert(source, tmp_path / "twin")
    held = sum(path.stat().st_size for path in (tmp_path / "twin").iterdir())
    assert held < int(needed.replace(",", ""))


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
def test_a_disk_that_fails_at_the_end_loses_nothing(
    source: Path, wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def copy(source: Path, target: Path) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(target))

    message = "has no room for it" if code in ("ENOSPC", "EDQUOT") else r"upcast\.new: .* must be writable"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", copy)
        with pytest.raises(upcast.UpcastError, match=f"{message}.*same command goes on from here"):
            convert.convert(source, tmp_path / "twin")
    monkeypatch.setattr(convert, "write_half", None)  # nothing is rounded again
    convert.convert(source, tmp_path / "twin")
    assert content(tmp_path / "twin") == wanted


def test_all_is_on_the_disk_before_the_name_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is in the twin was synced after it was written, its folder after that, and the folder above at last."""
    synced: list[int] = []
    fsync, unlink, rename = os.fsync, Path.unlink, Path.rename

    def sync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def unlinked(path: Path, **options: Any) -> None:
        synced.append(-1)  # its folder is to be synced again
        unlink(path, **options)

    def renamed(folder: Path, name: Path) -> Path:
        assert {path.stat().st_ino for path in folder.iterdir()} <= set(synced)
        assert synced[-1] == folder.stat().st_ino
        synced.clear()
        return rename(folder, name)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "unlink", unlinked)
    monkeypatch.setattr(Path, "rename", renamed)
    convert.convert(source, tmp_path / "twin")
    assert synced[0] == tmp_path.stat().st_ino

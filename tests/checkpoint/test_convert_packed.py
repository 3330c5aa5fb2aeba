"""python -m upcast convert --storage packed, and back: every bit; interrupted, and what it refuses."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run
from tests.packed_checkpoints import LIT, PACKED, ordinary, packed, same, state, write
from tests.peak_memory import ROOT
from upcast.checkpoint import conversion, packed_file, safetensors_file
from upcast.cli.main import main
from upcast.integrations import checkpoint_kinds, convert_packed
from upcast.integrations.exact_tensors import numbers

PROGRAM = str(Path(__file__).parents[1].joinpath("stop_points.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed file of all odd tensors, beside its source."""
    return packed(tmp_path_factory.mktemp("odd"))


def test_every_tensor_has_the_bits_that_it_had(whole: Path) -> None:
    found = packed_file.read(whole)
    assert list(found) == sorted(state(), key=list(found).index)
    assert all(same(numbers(found[name]), tensor) for name, tensor in state().items())
    assert found["tied"] is found["head"]


@pytest.mark.parametrize(
    ("name", "action", "reason"),
    [
        ("head", "pack", ""),
        ("escapes", "pack", ""),
        ("tied", "share", "equal to head"),
        ("wide", "pack", ""),
        ("half", "pack", ""),
        ("half with NaN", "keep", "float16 with NaNs"),
        ("kernel", "pack", ""),
        ("deep", "pack", ""),
        ("one row", "pack", ""),
        ("narrow", "keep", "not packed: 16 bits are fewer"),
        ("turned", "pack", ""),
        ("more digits", "keep", "not packed: bfloat16 does not have its numbers"),
        ("vector", "keep", "a vector"),
        ("nothing", "keep", "not a weight"),
    ],
)
def test_what_becomes_of_each(whole: Path, name: str, action: str, reason: str) -> None:
    rows = json.loads((whole.parent / "upcast.json").read_text())["tensors"]
    (row,) = (row for row in rows if row["name"] == name)
    assert (row["action"], row["reason"]) == (action, reason)


def test_the_way_back(whole: Path, tmp_path: Path) -> None:
    assert main(["convert", str(whole.parent), "--storage", "bfloat16", "--output", str(tmp_path / "back")]) == 0
    back = torch.load(tmp_path / "back" / LIT)
    assert set(back) == set(state())
    assert all(same(back[name], tensor) for name, tensor in state().items())
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def test_blobs_lie_at_whole_lines_of_memory(whole: Path) -> None:
    header = safetensors_file.read_header(whole)
    described = json.loads(header.metadata[packed_file.KEY])["tensors"]
    assert described
    assert all(header.entries[name].start % 64 == 0 for name in described)


def test_the_library_reads_the_file(whole: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    found = library.load_file(whole)
    assert same(found["vector"], torch.load(whole.parents[1] / "source" / LIT)["vector"])
    assert found["head"].dtype == torch.uint8


def test_default_names_and_second_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "model", {"a": ordinary(3, 640)})
    for said in ("packed: 1 tensors, 12.", "is there already, converted from this checkpoint"):
        assert main(["convert", str(folder), "--storage", "packed"]) == 0
        assert said in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "model-packed"), "--storage", "packed"]) == 0
    assert "is packed already" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "model-packed"), "--storage", "bfloat16"]) == 0
    names = ["model", "model-packed", "model-packed-bfloat16"]
    assert sorted(os.listdir(tmp_path)) == names


# --- interrupted ------------------------------------------------------------------------------------------------------

WAYS = ["kill", "interrupt", "full", "random"]
SOME = [(400, 0, "interrupt", "packed"), (700, 0, "kill", "packed"), (700, 0, "interrupt", "bfloat16")]
FULL = [(30, 0, "full", "packed")]
EVERY = [
    pytest.param(4, seed, way, storage, marks=pytest.mark.slow)
    for way in WAYS
    for seed in range(4)
    for storage in ("packed", "bfloat16")
]


@pytest.mark.parametrize(("stride", "seed", "way", "storage"), [*SOME, *FULL, *EVERY])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, python_with_libraries: Run, stride: int, seed: int, way: str, storage: str
) -> None:
    arguments = (str(tmp_path), way, str(stride), str(seed), storage)
    result = python_with_libraries(PROGRAM, *arguments, PYTHONPATH=str(ROOT), UPCAST_VERBOSE="0")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"[1-9]\d* stops\n", result.stdout), result.stdout


def test_what_is_written_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, write_tensor, left = write(tmp_path / "model"), conversion._write_tensor, iter(range(5))

    def some(*arguments: Any) -> dict[str, Any]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return write_tensor(*arguments)

    monkeypatch.setattr(conversion, "_write_tensor", some)
    with pytest.raises(KeyboardInterrupt):
        convert_packed.pack(folder)
    monkeypatch.setattr(conversion, "_write_tensor", write_tensor)
    convert_packed.pack(folder)
    assert "going on with model-packed.partial: 5 of 18" in capsys.readouterr().err
    assert all(
        same(numbers(packed_file.read(tmp_path / "model-packed" / PACKED)[name]), tensor)
        for name, tensor in state().items()
    )


def test_another_storage_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "model", {"a": ordinary(3, 640), "b": torch.randn(4)})
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_verify", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_packed.pack(folder, tmp_path / "twin")
    assert main(["convert", str(folder), "--output", str(tmp_path / "twin")]) == 0
    assert sorted(os.listdir(tmp_path / "twin")) == [LIT, "model_config.yaml", "tokenizer.json", "upcast.json"]


def test_what_is_read_back_must_be_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seal = write(tmp_path / "model"), convert_packed.Packing.seal

    def spoilt(self: Any, path: Path, checksums: Any) -> None:
        seal(self, path, checksums)
        entry = safetensors_file.read_header(path).entries["wide"]
        with path.open("r+b") as file:
            file.seek(entry.start + 40)
            file.write(b"\x55")

    monkeypatch.setattr(convert_packed.Packing, "seal", spoilt)
    with pytest.raises(upcast.UpcastError, match=r"what was read back is not what was written \(wide has other bits\)"):
        convert_packed.pack(folder)
    assert os.listdir(tmp_path) == ["model"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# --- refusals ---------------------------------------------------------------------------------------------------------


def _config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(fields))


def _shards(folder: Path, name: object) -> None:
    _config(folder)
    (folder / checkpoint_kinds.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))


def _safetensors(folder: Path, **fields: Any) -> None:
    _config(folder, **fields)
    with (folder / "model.safetensors").open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")


REFUSED: list[tuple[str, Any, str]] = [
    ("nothing", lambda folder: None, "has no weights that convert can pack or unpack"),
    ("a config alone", _config, "has no weights that convert can pack or unpack"),
    ("Diffusers", lambda folder: _safetensors(folder, _diffusers_version="1"), "is of Diffusers"),
    ("quantized", lambda f: _safetensors(f, quantization_config={"quant_method": "gptq"}), r"are quantized \(gptq\)"),
    ("an index outside", lambda folder: _shards(folder, "../model.safetensors"), "Do not trust it"),
    ("an index of numbers", lambda folder: _shards(folder, 3), "Do not trust it"),
    ("a shard that is not there", lambda folder: _shards(folder, "a.safetensors"), "no file .*a.safetensors"),
    (
        "an index that is none",
        lambda folder: (_config(folder), (folder / checkpoint_kinds.INDEX).write_text("[")),
        "is no JSON",
    ),
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(m, t, id=i) for i, m, t in REFUSED])
def test_folders_that_cannot_be_packed(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    with pytest.raises(upcast.UpcastError, match=message):
        convert_packed.pack(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.complex64), "is torch.complex64; a safetensors file has no such dtype"),
        (torch.eye(3).to_sparse(), "is no dense tensor with numbers"),
        (torch.empty(2, 2, device="meta"), "is no dense tensor with numbers"),
    ],
    ids=str,
)
def test_tensors_that_cannot_be_packed(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    folder = write(tmp_path / "model", {"a": ordinary(3, 640), "b": tensor})
    with pytest.raises(upcast.UpcastError, match=message):
        convert_packed.pack(folder)
    assert os.listdir(tmp_path) == ["model"]


def test_what_has_nothing_to_pack_and_what_is_not_packed(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {"a": torch.randn(30, 100)})
    assert "has no weight whose numbers are bfloat16's" in convert_packed.pack(folder)
    with pytest.raises(upcast.UpcastError, match="is not packed"):
        convert_packed.unpack(folder)
    assert os.listdir(tmp_path) == ["model"]

"""How weights are read: every reading gives the same numbers, and what was measured of this machine counts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import relative_error
from upcast.cli.main import main
from upcast.core.errors import UpcastError
from upcast.kernels import native, tune, tuning
from upcast.kernels.tuning import READINGS, Tuning

pytestmark = pytest.mark.skipif(not native.available(), reason="native kernels")

ROWS = [1, 2, 3, 4, 7, 8, 9, 17]
SHAPES = [(1, 1), (5, 3), (67, 577), (130, 1290), (4, 64), (3, 0)]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = tuning.in_use()
    yield
    tuning.use(None)
    assert tuning.in_use() == before


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is measured is kept: not there yet."""
    path = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv("UPCAST_TUNING", str(path))
    return path


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_gives_the_product(isa: str, reading: str, threads: int) -> None:
    torch.set_num_threads(threads)
    tuning.use(Tuning(reading, 0))
    assert tuning.in_use() == Tuning(reading, 0)
    for shape in SHAPES:
        weight, bias = torch.randn(shape).half(), torch.randn(shape[0])
        for rows in ROWS:
            x = torch.randn(rows, shape[1])
            want = x.double() @ weight.double().t() + bias
            assert relative_error(native.linear(x, weight, bias), want) < 2e-6
    torch.set_num_threads(2)


def other(reading: str) -> str:
    return next(name for name in READINGS if name != reading)


def test_what_was_measured_counts_until_it_is_taken_back(file: Path) -> None:
    usual = tuning.in_use()
    measured = Tuning(other(usual.reading), 64)
    assert tuning.save(measured, {"threads": 2}) == file
    assert "upcast's table" in tuning.describe()  # later processes go by it
    tuning.load()
    assert tuning.in_use() == measured
    assert f"{measured.reading}, torch's products from 64 rows on (measured, {file})" in tuning.describe()
    assert native.prefers_torch(64)
    assert not native.prefers_torch(63)
    tuning.use(None)
    assert tuning.in_use() == usual


def test_it_counts_for_its_processor_and_level_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tuning.in_use()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "processor", lambda: "another one")
        tuning.save(Tuning(other(usual.reading), 32), {})
    tuning.load()
    assert tuning.in_use() == usual
    tuning.save(Tuning(usual.reading, 128), {})
    assert {*json.loads(file.read_text())["processors"]} == {"another one", tuning.processor()}
    tuning.load()
    assert tuning.in_use() == Tuning(usual.reading, 128)


def entry(**fields: Any) -> str:
    return json.dumps({"version": 1, "processors": {tuning.processor(): {native.level(): fields}}})


BAD = {
    "no JSON": "{",
    "nothing": "",
    "a list": "[]",
    "another version": json.dumps({"version": 2, "processors": {}}),
    "an entry that is none": json.dumps({"version": 1, "processors": {tuning.processor(): {native.level(): 3}}}),
    "processors in a list": json.dumps({"version": 1, "processors": []}),
    "a reading that is none": entry(reading="backwards", torch_rows=0),
    "fewer than no rows": entry(reading="one_stream", torch_rows=-1),
    "more rows than there can be": entry(reading="one_stream", torch_rows=2**50),
    "rows in words": entry(reading="one_stream", torch_rows="many"),
    "no rows": entry(reading="one_stream"),
    "not text": "\udcff",
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_none_costs_nothing_but_itself(
    what: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.parent.mkdir()
    file.write_bytes(BAD[what].encode("utf-8", "surrogateescape"))
    usual = tuning.in_use()
    tuning.load()
    assert tuning.in_use() == usual
    assert capsys.readouterr().err.count("what upcast tune measured is left out") == 1
    assert "upcast's table" in tuning.describe()


def test_what_cannot_be_kept_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.parent.write_text("a file where a folder should be")
    with pytest.raises(UpcastError, match=r"cannot write .* set UPCAST_TUNING"):
        tuning.save(Tuning("one_stream", 0), {})
    monkeypatch.setenv("UPCAST_TUNING", "off")
    with pytest.raises(UpcastError, match="UPCAST_TUNING is off"):
        tuning.save(Tuning("one_stream", 0), {})
    with pytest.raises(UpcastError, match="backwards"):
        tuning.use(Tuning("backwards", 0))


THRESHOLDS: list[tuple[dict[int, float], int]] = [
    ({16: 2.0, 32: 1.5, 64: 1.1}, 0),
    ({16: 2.0, 32: 0.8, 64: 0.7}, 32),
    ({16: 0.5, 32: 0.8, 64: 0.7}, 16),
    ({16: 0.5, 32: 1.2, 64: 0.7}, 64),
    ({16: 0.5, 32: 0.6, 64: 0.99}, 0),  # within noise
]


@pytest.mark.parametrize(("ratios", "rows"), THRESHOLDS)
def test_torch_is_taken_from_where_it_is_always_faster(ratios: dict[int, float], rows: int) -> None:
    assert tune.threshold(ratios) == rows


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement of next to nothing."""
    monkeypatch.setattr(tune, "COLD_BYTES", 2**16)
    monkeypatch.setattr(tune, "SHAPES", ((16, 8), (8, 16)))
    monkeypatch.setattr(tune, "SECONDS", 0.0)


def test_the_command_measures_says_and_keeps(small: None, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = tuning.in_use()
    assert main(["tune", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(reading in said for reading in READINGS)
    assert not file.exists()
    assert main(["tune", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["reading"] in READINGS
    assert all(rate > 0 for rate in answer["gigabytes_per_second"].values())
    assert answer["file"] == str(file)
    assert tuning.in_use() == usual  # later processes go by it
    kept = json.loads(file.read_text())["processors"][tuning.processor()][native.level()]
    assert kept["reading"] == answer["reading"]

"""Hostile files and strings: one clear error with the file's name, in bounded time and memory, and no code is run."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run
from tests.hostile import LITGPT, ONE, PATTERNS, POLICIES, SHARDED
from upcast import UpcastError
from upcast.checkpoint import reading
from upcast.cli import checkpoints
from upcast.core import config
from upcast.core.tensor_ref import TensorRef
from upcast.patching import plan

LOADED = {"litgpt": LITGPT, "one": ONE, "sharded": SHARDED}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each case, in a process with limits."""
    base = tmp_path_factory.mktemp("hostile")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile", str(base)],
        env={**clean, "PYTHONPATH": str(ROOT), "UPCAST_VERBOSE": "0"},
        cwd=base,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert not (base / "RAN").exists()
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_policies(tried: dict[str, Any], name: str) -> None:
    got = tried["policies"][name]
    assert got.startswith("UpcastError: "), got
    assert re.search(POLICIES[name][1], got, re.DOTALL), got
    assert len(got) < 2000
    assert got.isascii() or "\N{REPLACEMENT CHARACTER}" in got


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_match_in_linear_time(tried: dict[str, Any], name: str) -> None:
    assert tried["patterns"][name] == f"returned {PATTERNS[name][2]}"


def test_a_policy_of_stars_is_applied(tried: dict[str, Any]) -> None:
    assert tried["policies at names"] == "returned 0"


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, cases in LOADED.items() for name in cases])
def test_checkpoints(tried: dict[str, Any], table: str, name: str) -> None:
    got, (_, file, said) = tried[table][name], LOADED[table][name]
    assert got.startswith("UpcastError: "), got
    assert re.search(rf"/bad/{table}/?{re.escape(file)}|/bad/{table}: {re.escape(file)}", got), got
    assert re.search(said, got, re.DOTALL), got
    assert len(got) < 2000


def test_a_hook_steps_aside_where_the_library_loads(tried: dict[str, Any]) -> None:
    got = tried["hook"]
    assert got.startswith("returned LlamaForCausalLM, and 1 line: "), got
    assert "runs as it is, unpatched: " in got
    assert "files of a checkpoint lie in its folder" in got


def test_the_environment(python_with_libraries: Run) -> None:
    result = python_with_libraries("-m", "upcast", "status", UPCAST_POLICY="none; \udcff=safe")
    assert result.returncode == 2
    assert r"'\udcff' cannot be printed (character 7)" in result.stderr
    assert "Traceback" not in result.stderr
    with pytest.raises(UpcastError, match="must be a number of at most 9 digits"):
        config.rank_of({"WORLD_SIZE": "9" * 5000})


def test_the_command_line_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UpcastError, match=r"config\.json is no JSON"):
        checkpoints.load(tmp_path)
    with pytest.raises(UpcastError, match="is no checkpoint folder"):
        checkpoints.load(Path("a" * 5000))


def test_weights_that_begin_alike_are_compared_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    equal = plan._bits_equal
    monkeypatch.setattr(plan, "_bits_equal", lambda a, b: compared.append(a) or equal(a, b))
    aliases = plan.Aliases()
    slots = [TensorRef(str(i), torch.zeros(9, 9), True, []) for i in range(99)]
    for i, slot in enumerate(slots):
        slot.tensor[8, 8] = i  # not among the few numbers that are looked at first
    assert [aliases.find(slot) for slot in slots] == [None] * 99
    assert aliases.find(slots[3]) is slots[3]
    assert len(compared) < 99 * 17


def test_a_compressed_archive_may_hold_more_than_its_size(tmp_path: Path) -> None:
    state = {f"w{i}": torch.zeros(1000, 500) for i in range(3)}
    torch.save(state, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in stored.namelist():
            small.writestr(name, stored.read(name))
    assert (tmp_path / "small.pth").stat().st_size < 100_000
    assert reading.checked(state, tmp_path / "small.pth") is state
    (tmp_path / "other.pth").write_bytes(b"x" * 100_000)
    with pytest.raises(UpcastError, match=r"other\.pth: tensors such as one of \(1000, 500\) repeat"):
        reading.checked(state, tmp_path / "other.pth")


def test_diffusers_read_no_shard_outside(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.parent.mkdir()
    (index.parent / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    index.write_text('{"metadata": {}, "weight_map": {"a": "in.safetensors", "b": "../../b.safetensors"}}')
    with pytest.raises(UpcastError, match=r"index\.json: it names '\.\./\.\./b.*lie in its folder"):
        upcast.from_pretrained(diffusers.UNet2DModel, tmp_path, subfolder="unet")

"""python -m upcast convert: streamed, atomic, verified, resumable; and what it refuses."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.peak_memory import ROOT
from upcast.cli.main import main
from upcast.core import console
from upcast.integrations.litgpt import convert

pytest.importorskip("litgpt")

IDS = torch.arange(14).view(2, 7) * 9
BIG = "transformer.h.1.mlp.proj.weight"


def spoil(state: dict[str, torch.Tensor]) -> None:
    """Tied weights written twice, and one weight that float16 cannot hold."""
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    state[BIG][0, 0] = 1e6


def checkpoint(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, name: str = "SmolLM2-135M-Instruct") -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config(name), dtype, spoil)


def twin_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-float16")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the twin ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "pythia-160m"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_twin_computes_what_its_source_computes(
    tmp_path: Path, dtype: torch.dtype, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path, dtype, name)
    before = content(folder)
    assert main(["convert", str(folder)]) == 0
    assert "verified: " in capsys.readouterr().out
    assert content(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "checkpoint-float16"]
    model = upcast.load_litgpt(twin_of(folder))
    with torch.inference_mode():
        assert torch.equal(model(IDS), upcast.load_litgpt(folder)(IDS))


def test_every_tensor_is_what_the_rule_says(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, torch.float32)
    convert.convert(folder)
    source, twin = (torch.load(f / "lit_model.pth") for f in (folder, twin_of(folder)))
    assert list(twin) == list(source)
    for name, tensor in source.items():
        wanted = torch.float32 if tensor.dim() < 2 or name == BIG else torch.float16
        assert twin[name].dtype == wanted, name
        assert torch.equal(twin[name], tensor.to(wanted)), name
    assert twin["lm_head.weight"].data_ptr() == twin["transformer.wte.weight"].data_ptr()


def test_the_twin_is_mapped_and_a_sound_zip_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.bfloat16)
    convert.convert(folder)
    weights = twin_of(folder) / "lit_model.pth"
    with zipfile.ZipFile(weights) as archive:
        assert archive.testzip() is None
        assert all(entry.CRC for entry in archive.infolist() if "/data/" in entry.filename)
    state = torch.load(weights, mmap=True)
    base = min(tensor.data_ptr() for tensor in state.values()) // 4096 * 4096
    assert all((tensor.data_ptr() - base) % 64 == 0 for tensor in state.values())
    model = upcast.load_litgpt(twin_of(folder))
    assert_patched(model)
    plan = upcast.patching.engine.record_of(model).plan
    assert {change.action for change in plan.changes if len(change.shape) >= 2} == {"wrap"}


def test_an_unpatched_litgpt_reads_the_twin(tmp_path: Path) -> None:
    from lightning import Fabric
    from litgpt import GPT, Config
    from litgpt.utils import load_checkpoint

    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.bfloat16)
    convert.convert(folder)
    model = GPT(Config.from_file(twin_of(folder) / "model_config.yaml")).eval()
    load_checkpoint(Fabric(accelerator="cpu", devices=1), model, twin_of(folder) / "lit_model.pth")
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS), upcast.load_litgpt(folder)(IDS), rtol=1e-4, atol=1e-5)


def test_files_beside_the_weights_come_along(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Default\n")
    convert.convert(folder, tmp_path / "elsewhere" / "twin")
    twin = content(tmp_path / "elsewhere" / "twin")
    beside = {name: data for name, data in content(folder).items() if not name.endswith((".pth", ".bin"))}
    assert {name: data for name, data in twin.items() if name in beside} == beside
    assert set(twin) == {*beside, "lit_model.pth", "upcast.json"}


def test_the_report_is_kept(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, torch.float32)
    text = convert.convert(folder)
    rows = {row["name"]: row for row in json.loads((twin_of(folder) / "upcast.json").read_text())["tensors"]}
    state = torch.load(folder / "lit_model.pth")
    weight = state["transformer.h.0.attn.proj.weight"]
    error = float((weight.half().float() - weight).abs().max())
    assert rows["transformer.h.0.attn.proj.weight"]["max_error"] == error > 0
    assert rows[BIG]["reason"] == "1 values beyond 65504"
    assert "1 (1 values beyond 65504)" in text
    assert f"{max(row['max_error'] for row in rows.values()):.1e}" in text


PEAK = """
import sys
from pathlib import Path
import upcast.integrations.litgpt.convert
from benchmarks.harness import memory
upcast.integrations.litgpt.convert.convert(Path(sys.argv[1]))  # brings in what any conversion needs of torch
memory.reset_peak()
before = memory.resident_bytes()
upcast.integrations.litgpt.convert.convert(Path(sys.argv[2]))
print(memory.peak_bytes() - before)
"""


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, python: Run) -> None:
    config = small_config("pythia-160m", n_layer=12, n_embd=512, padded_vocab_size=4000, vocab_size=4000)
    folder = write_checkpoint(tmp_path / "checkpoint", config, torch.float32)
    small = write_checkpoint(tmp_path / "small", small_config("pythia-160m"), torch.float32)
    result = python("-c", PEAK, str(small), str(folder), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    largest = max(tensor.nbytes for tensor in torch.load(folder / "lit_model.pth", mmap=True).values())
    size = (folder / "lit_model.pth").stat().st_size
    noise = 8e6  # the allocator's, with two threads: the same conversion was seen to differ by 4 MB
    assert int(result.stdout) < 2 * largest + noise < size / 4


# --- interrupted ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from upcast.core import console
from upcast.checkpoint import zip_writer
from upcast.cli.main import main
from upcast.checkpoint import conversion
left = int(sys.argv[2])
write = conversion._write_tensor
def write_some(*arguments):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return write(*arguments)
conversion._write_tensor = write_some
if sys.argv[3:]:
    setattr(zip_writer, sys.argv[3], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
main(["convert", sys.argv[1]])
"""

MORE = [["0"], ["999", "check"], ["999", "lay_out"]]
WHERE = [["7"], ["999", "seal"], *(pytest.param(w, marks=pytest.mark.slow) for w in MORE)]


@pytest.mark.parametrize("where", WHERE, ids=str)
def test_killed_half_way_it_goes_on(tmp_path: Path, python_with_libraries: Run, where: list[str]) -> None:
    folder = checkpoint(tmp_path)
    assert python_with_libraries("-c", KILLED, str(folder), *where).returncode == -9
    assert not twin_of(folder).exists()
    partial = twin_of(folder).with_name("checkpoint-float16.partial")
    journal = partial / "upcast.journal"
    assert partial.is_dir()
    written = len(journal.read_text().splitlines()) if journal.exists() else 0
    assert written == {"0": 0, "7": 7}.get(where[0], 0 if "lay_out" in where else 23)
    result = python_with_libraries("-m", "upcast", "convert", str(folder))
    assert result.returncode == 0, result.stderr
    assert (f"going on with checkpoint-float16.partial: {written} of 24" in result.stderr) == bool(written)
    assert not partial.exists()
    resumed = content(twin_of(folder))["lit_model.pth"]
    convert.convert(folder, tmp_path / "in one go")
    assert zipfile.ZipFile(twin_of(folder) / "lit_model.pth").testzip() is None
    assert resumed == content(tmp_path / "in one go")["lit_model.pth"]
    with torch.inference_mode():
        assert torch.equal(upcast.load_litgpt(twin_of(folder))(IDS), upcast.load_litgpt(folder)(IDS))


def test_a_journal_cut_short_counts_to_its_last_whole_line(tmp_path: Path, python_with_libraries: Run) -> None:
    folder = checkpoint(tmp_path)
    assert python_with_libraries("-c", KILLED, str(folder), "5").returncode == -9
    journal = tmp_path / "checkpoint-float16.partial" / "upcast.journal"
    journal.write_text(journal.read_text()[:-9])
    result = python_with_libraries("-m", "upcast", "convert", str(folder))
    assert "4 of 24 tensors are written" in result.stderr
    assert result.returncode == 0, result.stderr


def test_another_source_starts_anew(tmp_path: Path, python_with_libraries: Run) -> None:
    folder = checkpoint(tmp_path)
    assert python_with_libraries("-c", KILLED, str(folder), "5").returncode == -9
    state = torch.load(folder / "lit_model.pth")
    torch.save({name: tensor * 2 for name, tensor in state.items()}, folder / "lit_model.pth")
    convert.convert(folder)
    twin = torch.load(twin_of(folder) / "lit_model.pth")
    assert all(torch.equal(twin[name].float(), (2 * tensor).float()) for name, tensor in state.items())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_float16_checkpoint_needs_no_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    assert main(["convert", str(folder)]) == 0
    assert "is float16 already: nothing to convert" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_a_twin_needs_no_twin(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    convert.convert(folder)
    assert "is there already, converted from this checkpoint" in convert.convert(folder)
    assert "is float16 already: nothing to convert" in convert.convert(twin_of(folder))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "checkpoint-float16"]


def test_a_float16_checkpoint_of_the_old_format_gets_a_twin(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"))
    state = torch.load(folder / "lit_model.pth")
    torch.save(state, folder / "lit_model.pth", _use_new_zipfile_serialization=False)
    convert.convert(folder)
    assert zipfile.is_zipfile(twin_of(folder) / "lit_model.pth")


def _cut(folder: Path) -> None:
    data = (folder / "lit_model.pth").read_bytes()
    (folder / "lit_model.pth").write_bytes(data[: len(data) // 2])


BROKEN: list[tuple[str, Any, str]] = [
    ("truncated", _cut, "cannot be read, it may be truncated"),
    ("foreign", lambda f: (f / "lit_model.pth").write_text("hello"), "cannot be read|holds more than tensors"),
    ("code", lambda f: torch.save({"a": print}, f / "lit_model.pth"), "holds more than tensors"),
    ("no weights", lambda f: (f / "lit_model.pth").unlink(), r"no file .*lit_model\.pth"),
    ("no config", lambda f: (f / "model_config.yaml").unlink(), r"no file .*model_config\.yaml"),
]


@pytest.mark.parametrize(("damage", "message"), [pytest.param(d, m, id=i) for i, d, m in BROKEN])
def test_broken_sources(tmp_path: Path, damage: Any, message: str) -> None:
    folder = checkpoint(tmp_path)
    damage(folder)
    with pytest.raises(upcast.UpcastError, match=message):
        convert.convert(folder)
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_the_same_folder_and_a_taken_one_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    before = content(folder)
    with pytest.raises(upcast.UpcastError, match="is the checkpoint itself"):
        convert.convert(folder, folder)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("dear")
    with pytest.raises(upcast.UpcastError, match="is there already, and is not a float16 copy"):
        convert.convert(folder, tmp_path / "taken")
    with pytest.raises(upcast.UpcastError, match="no folder nowhere"):
        convert.convert(Path("nowhere"))
    assert content(folder) == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "taken"]


LIMITED = """
import resource, sys
from upcast.cli.main import main
from upcast.integrations.litgpt import convert
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    print(main(["convert", sys.argv[1]]))
"""


def test_no_room(tmp_path: Path, python: Run) -> None:
    """Under a limit on file size the system refuses to write, as it does on a full disk."""
    folder = checkpoint(tmp_path)
    result = python("-c", LIMITED, str(folder), "0", "5000", "60000")
    assert result.stdout.split() == ["2", "2", "2"], result.stderr
    assert result.stderr.count("has no room for it") == 3
    assert os.listdir(tmp_path) == ["checkpoint"]


# --- progress ---------------------------------------------------------------------------------------------------------


def test_all_phases_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[tuple[str, console.Progress]] = []
    monkeypatch.setattr(console.Progress, "phase", lambda bar, what: phases.append((what, bar)))
    convert.convert(checkpoint(tmp_path))
    assert [what for what, _ in phases] == ["surveying", "converting", "verifying"]
    bar = phases[-1][1]
    assert 0.9 < bar.done / bar.total <= 1  # the new file is about as large as was expected

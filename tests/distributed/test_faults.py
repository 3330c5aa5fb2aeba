"""A rank that is lost, never comes, fails or differs: every other rank ends in time, and names it and the reason."""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.test_distributed import ROOT, free_port, rank_environment
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")

RANKS, LONG = 3, 120.0
ENOUGH = 200  # seconds to wait for a rank before the test gives up on it


@dataclass(frozen=True)
class Fault:
    """What every survivor says; which rank is lost, if it is; the timeout of the ranks, and whether it has to pass."""

    says: str
    lost: int | None = RANKS - 1
    timeout: float = LONG


# Where the timeout has to pass it is longer than a rank takes to start on a busy machine: it would count as absent.
FAULTS = {
    "killed": Fault(r"rank \d: rank 2 is gone: its connection was closed"),
    "gloo-killed": Fault(r"rank \d: rank 2 is gone: its connection was closed"),
    "killed-connecting": Fault(r"rank \d found the others but rank 2 is gone", timeout=25),
    "killed-loading": Fault(r"rank \d: rank 2 is gone: its connection was closed"),
    "raises": Fault(r"rank \d: rank 2 failed: no memory left for this test"),
    "stopped": Fault(r"rank \d: rank 2 did not answer in time", timeout=25),
    "gloo-stopped": Fault(r"rank \d: rank 2 did not answer in time", timeout=25),
    "absent": Fault(r"rank 2 of 3 did not join within 25 s", timeout=25),
    "absent-first": Fault(r"rank \d cannot reach the store of rank 0 at 127.0.0.1:\d+ within 4 s", 0, timeout=4),
    "version": Fault(r"rank \d: rank 2 has upcast version '0.0.1', rank 0 has '\d", None),
    "policy": Fault(r"rank \d: rank 2 has policy 'none', rank 0 has 'safe'", None),
    "checkpoint": Fault(r"rank \d: rank 2 has checkpoint '\w{8}', rank 0 has '\w{8}'", None),
    "no-checkpoint": Fault(r"rank \d: rank 2 failed: .*-missing"),
    "option": Fault(r"rank \d: rank 2 has kv_cache 'float32', rank 0 has 'float16'", None),
}
QUICK = [("litgpt", "killed")]
TRANSFORMERS = ("killed", "killed-loading", "stopped", "raises", "version", "policy", "checkpoint", "no-checkpoint")
CASES = [("litgpt", name) for name in FAULTS] + [("transformers", name) for name in TRANSFORMERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("fault")
    config = small_config("pythia-14m")

    def change(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"][0, 0] += 1

    write_checkpoint(home / "model-other", config, spoil=change)
    found = {"litgpt": write_checkpoint(home / "model", config)}
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99, eos_token_id=None))
    found["transformers"] = home / "llama"
    model.save_pretrained(home / "llama")
    model.lm_head.weight.data[0, 0] += 1
    model.save_pretrained(home / "llama-other")
    return found


def end_of(process: "subprocess.Popen[str]") -> tuple[str, int, float]:
    """What a rank said on stderr, its exit code, and when it ended."""
    _, errors = process.communicate(timeout=ENOUGH)
    return errors, process.returncode, time.monotonic()


@pytest.mark.parametrize(
    ("door", "name"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_survivors_name_the_rank(door: str, name: str, folders: dict[str, Path]) -> None:
    folder = folders[door]
    fault, port, before = FAULTS[name], free_port(), sorted(folder.parent.rglob("*"))
    command = [sys.executable, str(ROOT / "tests" / "fault_worker.py"), door, str(folder), f"{fault.timeout:g}", name]
    started = [
        subprocess.Popen(
            command, env=rank_environment(rank, RANKS, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    begin = time.monotonic()
    with ThreadPoolExecutor(RANKS) as pool:
        ends = [pool.submit(end_of, process) for process in started]
        try:
            found = {rank: end.result() for rank, end in enumerate(ends) if rank != fault.lost}
        finally:
            for process in started:
                process.kill()
    lost = begin if fault.lost is None else ends[fault.lost].result()[2]
    for rank, (errors, code, ended) in found.items():
        assert code == 2, (rank, errors)
        assert re.search("upcast: " + fault.says, errors), (rank, errors)
        assert len(re.findall("^upcast: .*rank", errors, re.MULTILINE)) == 1, (rank, errors)
        assert "Traceback" not in errors, (rank, errors)
        after = f", {ended - lost:.1f} s after rank {fault.lost} ended" if begin < lost < ended else ""
        print(f"{name}, timeout {fault.timeout:g} s: rank {rank} took {ended - begin:.1f} s in all{after}")
    assert sorted(folder.parent.rglob("*")) == before  # nothing written, nothing half-written


def test_a_sample_of_numbers_tells_checkpoints_apart(folders: dict[str, Path]) -> None:
    from upcast.checkpoint import reading
    from upcast.distributed.consistency import fingerprint

    folder = folders["litgpt"]
    same, other = (reading.read(f / "lit_model.pth") for f in (folder, folder.with_name("model-other")))
    assert sum(not torch.equal(same[name], other[name]) for name in same) == 1
    assert fingerprint(same) != fingerprint(other)
    assert fingerprint(same) == fingerprint(reading.read(folder / "lit_model.pth"))

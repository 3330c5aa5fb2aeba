"""A rank that is lost, never comes, fails or differs: every other rank ends in time and names it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.test_distributed import ROOT, free_port, rank_environment

pytest.importorskip("litgpt")

# fault of the last of three ranks -> (what every survivor says, the rank it names)
FAULTS = {
    "killed": r"upcast: rank \d: rank 2 is gone: its connection was closed",
    "raises": r"upcast: rank \d: rank 2 failed: no memory left for this test",
    "stopped": r"upcast: rank \d: rank 2 did not answer in time",
    "absent": r"upcast: rank 2 of 3 did not join within 25 s",
    "absent-first": r"upcast: rank \d cannot reach the store of rank 0 at 127.0.0.1:\d+ within 4 s",
    "differs": r"upcast: rank \d: rank 1 has kv_cache 'float32', rank 0 has 'float16'",
}
SLOW = ("absent", "stopped", "raises", "absent-first", "differs")
# Seconds; longer where a rank that is merely slow to start on a busy machine would be taken for the fault under test.
TIMEOUTS, ENOUGH = {"absent": 25, "stopped": 25, "absent-first": 4}, 150
RANKS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fault") / "model", small_config("pythia-14m"))


@pytest.mark.parametrize("fault", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAULTS])
def test_survivors_name_the_rank(fault: str, folder: Path) -> None:
    timeout = TIMEOUTS.get(fault, ENOUGH)
    command = [sys.executable, str(ROOT / "tests" / "fault_worker.py"), str(folder), str(timeout), fault]
    port = free_port()
    started = [
        subprocess.Popen(
            command, env=rank_environment(rank, RANKS, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    faulty = {"absent-first": 0, "differs": None}.get(fault, RANKS - 1)
    try:
        for rank, process in enumerate(started):
            if rank == faulty:
                continue
            out, errors = process.communicate(timeout=ENOUGH)
            assert process.returncode == 2, (rank, out, errors)
            assert re.search(FAULTS[fault], errors), (rank, errors)
            assert "Traceback" not in errors, (rank, errors)
    finally:
        for process in started:
            process.kill()
            process.communicate()

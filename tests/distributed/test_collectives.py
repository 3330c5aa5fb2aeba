"""torch.distributed on patched models: two processes, each operation against the unpatched model."""

import json
import subprocess
import sys
from pathlib import Path

from tests.collectives_worker import PROGRAMS


def test_collectives_and_data_parallel_training(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.collectives_worker"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        out, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0
        found = json.loads(out)
        assert found.keys() == {program.__name__ for program in PROGRAMS}
        assert {name: error for name, error in found.items() if error > 2e-3} == {}  # a sum is rounded to float16

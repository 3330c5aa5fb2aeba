"""One rank of the tests of faults.

usage: fault_worker.py CHECKPOINT_FOLDER TIMEOUT FAULT, where the last rank does FAULT at its 20th collective.
"""

import os
import signal
import sys

from upcast import cli
from upcast.distributed import group

FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raises": lambda: (_ for _ in ()).throw(MemoryError("no memory left for this test")),
}

folder, timeout, fault = sys.argv[1:]
kv_cache = ["--kv-cache", "float32"] if fault == "differs" and os.environ["RANK"] != "0" else []
original = group.Group.sum


def sum_or_fail(self, x):
    if self.rank == self.size - 1 and self.calls >= 20 and fault in FAULTS:
        FAULTS[fault]()
    return original(self, x)


group.Group.sum = sum_or_fail
if fault == "absent" and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    sys.exit(0)
if fault == "absent-first" and os.environ["RANK"] == "0":
    sys.exit(0)
command = ["generate", folder, "--prompt", "abc", "--max-new-tokens", "20", "--timeout", timeout, *kv_cache]
sys.exit(cli.main(command))

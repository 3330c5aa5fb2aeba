"""One rank of the tests of faults.

usage: fault_worker.py CHECKPOINT_FOLDER TIMEOUT FAULT: the last rank does FAULT, or differs from the others in it.
"""

import os
import signal
import sys
from typing import Any

from upcast import cli
from upcast.distributed import group, joining
from upcast.integrations import litgpt_parallel


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def run_out() -> None:
    raise MemoryError("no memory left for this test")


def before(owner: Any, name: str, fault: Any, when: Any = lambda *_: True) -> None:
    """Have ``fault`` done as the function ``name`` of ``owner`` is called, once ``when`` holds for its arguments."""
    original = getattr(owner, name)

    def with_fault(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, with_fault)


def in_the_middle(of: group.Group, *_: Any) -> bool:
    return of.calls >= 20


folder, timeout, fault = sys.argv[1:]
options = ["--prompt", "abc", "--max-new-tokens", "20", "--timeout", timeout]
last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
if (fault == "absent" and last) or (fault == "absent-first" and os.environ["RANK"] == "0"):
    sys.exit(0)
if fault.startswith("gloo"):
    litgpt_parallel.Group.share = lambda self: None  # type: ignore[method-assign]
if last and fault == "killed-connecting":
    before(joining.dist, "init_process_group", kill)
elif last and fault == "killed-loading":
    before(litgpt_parallel, "take", kill)
elif last and fault in ("killed", "gloo-killed"):
    before(group.Group, "sum", kill, in_the_middle)
elif last and fault in ("stopped", "gloo-stopped"):
    before(group.Group, "sum", stop, in_the_middle)
elif last and fault == "raises":
    before(group.Group, "sum", run_out, in_the_middle)
elif last and fault == "version":
    litgpt_parallel.version = lambda name: "0.0.1"
elif last and fault == "policy":
    os.environ["UPCAST_POLICY"] = "none"
elif last and fault == "checkpoint":
    folder += "-other"
elif last and fault == "no-checkpoint":
    folder += "-missing"
elif last and fault == "option":
    options += ["--kv-cache", "float32"]
sys.exit(cli.main(["generate", folder, *options]))

"""One rank of the tests of faults.

usage: fault_worker.py DOOR CHECKPOINT_FOLDER TIMEOUT FAULT: the last rank does FAULT, or differs from the others in it.
DOOR: litgpt (python -m upcast generate) or transformers (a script with tp_plan="auto").
"""

import os
import signal
import sys
from typing import Any

import torch

import upcast
from upcast.cli.main import main
from upcast.distributed import collectives, consistency, rendezvous
from upcast.integrations import loading
from upcast.integrations.litgpt import tensor_parallel
from upcast.tensor.half_weight import HalfWeight


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
        if when(*args, **kwargs):
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, with_fault)


def in_the_middle(of: collectives.Group, *_: Any) -> bool:
    return of.calls >= 20


def after(count: int) -> Any:
    calls = iter(range(count))
    return lambda *_, **__: next(calls, None) is None


def generate_with_transformers(folder: str, timeout: float) -> int:
    """What a user's script does, and of an error what the command line does."""
    from transformers import AutoModelForCausalLM

    try:
        with rendezvous.joined(timeout):
            model = upcast.from_pretrained(AutoModelForCausalLM, folder, tp_plan="auto", policy=policy)
            if all(not isinstance(p, HalfWeight) for p in model.parameters()):
                raise AssertionError("nothing is patched")
            model.generate(torch.arange(1, 9)[None], max_new_tokens=20, do_sample=False)
        return 0
    except upcast.UpcastError as error:
        print(f"upcast: {error}", file=sys.stderr)
        return 2


FAULTS_IN_THE_MIDDLE = {"killed": kill, "stopped": stop, "raises": run_out}

door, folder, timeout, fault = sys.argv[1:]
policy = "safe"
options = ["--prompt", "abc", "--max-new-tokens", "20", "--timeout", timeout]
last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
if (fault == "absent" and last) or (fault == "absent-first" and os.environ["RANK"] == "0"):
    sys.exit(0)
if fault.startswith("gloo"):
    tensor_parallel.Group.share = lambda self: None  # type: ignore[method-assign]
if last and fault == "killed-connecting":
    before(rendezvous.dist, "init_process_group", kill)
elif last and fault in FAULTS_IN_THE_MIDDLE and door == "transformers":
    before(torch.distributed, "all_reduce", FAULTS_IN_THE_MIDDLE[fault], after(20))
elif last and fault == "killed-loading" and door == "transformers":
    before(loading.Loading, "arrive", kill, after(5))
elif last and fault == "killed-loading":
    before(tensor_parallel, "take", kill)
elif last and fault in ("killed", "gloo-killed"):
    before(collectives.Group, "sum", kill, in_the_middle)
elif last and fault in ("stopped", "gloo-stopped"):
    before(collectives.Group, "sum", stop, in_the_middle)
elif last and fault == "raises":
    before(collectives.Group, "sum", run_out, in_the_middle)
elif last and fault == "version":
    consistency.version = lambda name: "0.0.1"
elif last and fault == "policy":
    os.environ["UPCAST_POLICY"] = policy = "none"
elif last and fault == "checkpoint":
    folder += "-other"
elif last and fault == "no-checkpoint":
    folder += "-missing"
elif last and fault == "option":
    options += ["--kv-cache", "float32"]
if door == "transformers":
    sys.exit(generate_with_transformers(folder, float(timeout)))
sys.exit(main(["generate", folder, *options]))

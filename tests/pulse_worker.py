"""One rank of the tests of the pulse.

usage: pulse_worker.py leave | fork | busy | exit
"""

import os
import signal
import sys
import threading
import time
import warnings

if sys.argv[1] == "leave":  # who comes again may reach a store that is being closed: torch says so, and tries again
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch
import torch.distributed as dist

from upcast.distributed import Group, RankError, join, joined, leave, pulse

BUSY = 6.0  # seconds; the others have found out and ended by then


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("upcast")]


def leave_and_come_again() -> None:
    """Each time there is one pulse, however many groups; none afterwards."""
    for _ in range(3):
        mesh = join(timeout=60)
        groups = [Group(mesh.get_group()) for _ in range(3)]
        assert float(groups[0].sum(torch.ones(1))) == groups[0].size
        assert alive() == ["upcast-pulse"] * (groups[0].size > 1)
        leave(mesh)
        assert alive() == []
    files = len(os.listdir("/proc/self/fd"))
    mesh = join(timeout=60)
    leave(mesh)
    assert len(os.listdir("/proc/self/fd")) <= files


def fork() -> None:
    """A child has no pulse, and takes nothing from that of its parent."""
    warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork beside threads, as gloo's are
    with joined(timeout=60):
        child = os.fork()
        if child == 0:
            pulse.stop()
            os._exit(len(alive()))
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(2 * pulse.BEAT)
        assert alive() == ["upcast-pulse"]


def one_is_killed_while_another_is_busy() -> None:
    try:
        with joined(timeout=60) as mesh:
            group = Group(mesh.get_group())
            group.sum(torch.ones(1))
            if group.rank == group.size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(BUSY * group.rank)
            group.sum(torch.ones(1))
    except RankError as error:
        print(error)


def end_without_a_word() -> None:
    join(timeout=60)
    dist.barrier()
    dist.destroy_process_group()  # as a script does that knows nothing of `leave`


{
    "leave": leave_and_come_again,
    "fork": fork,
    "busy": one_is_killed_while_another_is_busy,
    "exit": end_without_a_word,
}[sys.argv[1]]()

"""One region of the pool serves a whole block: any number of threads, callers at once, and after a fork."""

import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.example_block import example
from upcast.kernels import native

THREADS = [1, 2, 3, 7, 64]  # more than there are cores, too


def arguments() -> tuple[Any, ...]:
    x, cos, sin, spec = example()
    return x, cos, sin, None, None, spec


def block() -> Tensor:
    out = native.block(*arguments())
    assert out is not None
    return out


@pytest.fixture
def alone() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = block()
    torch.set_num_threads(2)
    yield expected
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", THREADS)
def test_any_number_of_threads_gives_the_same(alone: Tensor, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.testing.assert_close(block(), alone, rtol=1e-5, atol=1e-6)


def test_callers_at_once_have_a_team_each(alone: Tensor) -> None:
    wrong: list[float] = []

    def call() -> None:
        for _ in range(5):
            difference = float((block() - alone).abs().max())
            if difference > 1e-5:
                wrong.append(difference)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork(alone: Tensor) -> None:
    """The pool's threads do not exist in the child: waiting for them would hang."""
    ready = arguments()  # torch's own operations on large tensors would wait for the pool, too
    native.block(*ready)
    child = os.fork()
    if child == 0:
        out = native.block(*ready)
        os._exit(0 if out is not None and torch.allclose(out, alone, rtol=1e-5, atol=1e-5) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

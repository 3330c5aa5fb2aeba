"""Sums and gathers through memory that ranks share equal those through gloo; who has left is missed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_distributed import ROOT, run_ranks
from tests.warm import Warm
from upcast.core.errors import UpcastError
from upcast.distributed import shared_memory
from upcast.kernels import native

RANKS = 3
pytestmark = pytest.mark.skipif(not native.available(), reason="ranks meet in the native library")


@pytest.fixture(scope="module")
def every(warm_process: Warm, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    output = tmp_path_factory.mktemp("shared")
    for _, errors, code in run_ranks(RANKS, [ROOT / "tests" / "shared_worker.py", output], warm_process=warm_process):
        assert code == 0, errors
    return [torch.load(output / f"{rank}.pt") for rank in range(RANKS)]


def test_sums_and_gathers_equal_those_of_gloo(every: list[Any]) -> None:
    for rank in every:
        assert rank["sizes"][-1] > shared_memory.SEGMENT  # in several pieces
        for ours, gloo in rank["sums"]:
            torch.testing.assert_close(ours, gloo)
        for ours, gloo in rank["gathered"]:
            assert torch.equal(ours, gloo)
        for mine, first in zip(rank["sums"], every[0]["sums"], strict=True):
            assert torch.equal(mine[0], first[0])  # the same bits on every rank


def test_who_has_left_is_missed(every: list[Any]) -> None:
    for rank, found in enumerate(every[:-1]):
        assert found["missed"] == f"rank {RANKS - 1} let go of the shared memory", rank
    assert every[-1]["missed"] == "this rank has left"


@pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")
def test_another_s_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (host, process, number, token), file = shared_memory.offer(2)
    with pytest.raises(OSError, match="another process"):
        shared_memory.accept((host, process, number, b"x" * len(token)))
    with pytest.raises(OSError, match="another host"):
        shared_memory.accept((f"{host}0", process, number, token))
    Path(f"/proc/self/fd/{shared_memory.accept((host, process, number, token))}").stat()
    monkeypatch.setattr(shared_memory.kernels, "name", lambda: "portable")
    with pytest.raises(OSError, match="no native kernels"):
        shared_memory.offer(2)
    assert file > 0


@pytest.mark.parametrize("counters", [torch.zeros(2, 8), torch.zeros(16, dtype=torch.int64), torch.zeros(2, 4).long()])
def test_counters_that_are_none_are_refused(counters: torch.Tensor) -> None:
    with pytest.raises(UpcastError):
        native.meet(counters, 0, 1, 0)


def test_the_late_rank_is_named() -> None:
    counters = torch.zeros(3, 8, dtype=torch.int64)
    counters[0, 0] = counters[2, 0] = 5
    assert native.meet(counters, 2, 5, 1_000_000) == 1
    assert native.meet(counters, 1, 5, 1_000_000) == -1
    with pytest.raises(UpcastError, match="for rank 3"):
        native.meet(counters, 3, 5, 0)


def test_sums_into_places_that_do_not_fit_are_refused() -> None:
    counters, places = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 4)
    for x, where in ((torch.zeros(5), places), (torch.zeros(4), torch.zeros(3, 4)), (torch.zeros(4).half(), places)):
        with pytest.raises(UpcastError):
            native.add_up(x, where, counters, 0, 1, 0)


def test_a_sum_that_waits_changes_nothing_yet() -> None:
    counters, places, x = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 4), torch.arange(3.0)
    assert native.add_up(x, places, counters, 0, 1, 1000) == 1
    assert x.tolist() == [0.0, 1.0, 2.0] == places[0, :3].tolist()
    counters[1, 0] = 1
    places[1] = 10
    assert native.add_up(x, places, counters, 0, 1, 1000) == -1
    assert x.tolist() == [10.0, 11.0, 12.0]

"""Who is busy is told from who is lost, survivors say the same, and the thread that counts ends with the group."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from tests.distributed.test_distributed import ROOT, run_ranks
from upcast.distributed import pulse

RANKS, GRACE = 3, 1.2
CLOSED, TIMED_OUT = "Connection closed by peer", "Timed out waiting 25000ms for recv operation"
ENDS = [("fork", 2), ("exit", 2), ("leave", 1)]
GONE = "rank 2 is gone: its connection was closed"


class World:
    """Stands for the default process group."""


@pytest.fixture
def pulses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[pulse.Pulse]]:
    """The pulses of three ranks, all of them in this process."""
    store, ranks = HashStore(), iter(range(RANKS))
    stands_for_dist: Any = SimpleNamespace(
        group=SimpleNamespace(WORLD=World()),
        get_rank=lambda: next(ranks),
        get_world_size=lambda: RANKS,
        distributed_c10d=SimpleNamespace(_get_default_store=lambda: store),
    )
    monkeypatch.setattr(pulse, "dist", stands_for_dist)
    monkeypatch.setattr(pulse, "BEAT", 0.2)
    monkeypatch.setattr(pulse, "_LEAST", GRACE)
    made = [pulse.Pulse() for _ in range(RANKS)]
    for each in made:
        assert each._open.wait(10)
    yield made
    for each in made:
        each.stop()
        assert not each._thread.is_alive()


def verdict(of: pulse.Pulse, saw: str) -> str:
    return of.verdict(saw, range(RANKS), GRACE)


def test_a_busy_rank_is_not_named_and_hears_who_is(pulses: list[pulse.Pulse]) -> None:
    pulses[2].stop()
    assert verdict(pulses[0], CLOSED) == GONE
    assert pulses[1].heard == {"says": GONE, "lost": [2]}  # before it has noticed anything
    assert verdict(pulses[1], f"{TIMED_OUT}, for rank 0 has ended") == GONE


@pytest.mark.parametrize("first", [0, 1])
def test_who_sees_a_connection_closed_by_one_that_gave_up_says_the_same(first: int, pulses: list[pulse.Pulse]) -> None:
    pulses[2].stop()
    with ThreadPoolExecutor(RANKS) as pool:
        found = []
        for rank in (first, 1 - first):
            found.append(pool.submit(verdict, pulses[rank], (TIMED_OUT, CLOSED)[rank]))
            time.sleep(0.2)
        assert {each.result() for each in found} == {"rank 2 did not answer in time"}


def test_a_count_that_comes_late_is_none(pulses: list[pulse.Pulse]) -> None:
    pulses[2].stop()
    count = pulse._COUNT.format(2)
    late = threading.Timer(pulse.BEAT, pulses[0]._store.add, (count, 1))
    late.start()
    assert verdict(pulses[0], CLOSED) == GONE
    late.join()


def test_the_reason_of_a_rank_that_failed(pulses: list[pulse.Pulse]) -> None:
    pulses[2].stay(pulses[2].fail("no memory", GRACE), GRACE)
    start = time.monotonic()
    assert {verdict(each, CLOSED) for each in pulses} == {"rank 2 failed: no memory"}
    assert time.monotonic() - start < GRACE  # no roll call; rank 0 waits for no more than a beat of rank 1


def test_a_rank_that_has_left(pulses: list[pulse.Pulse]) -> None:
    pulses[2].stop(left=True)
    assert "rank 2 has left" in verdict(pulses[0], CLOSED)


def test_a_rank_that_is_busy_for_too_long(pulses: list[pulse.Pulse]) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        found = set(pool.map(lambda rank: verdict(pulses[rank], TIMED_OUT), (0, 1)))
    assert found == {"rank 2 lives, but did not answer in time: it is busy for longer than the timeout"}


def test_ranks_that_all_live(pulses: list[pulse.Pulse]) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        found = set(pool.map(lambda each: verdict(each, CLOSED), pulses))
    assert found == {f"the ranks cannot reach each other, though all 3 live ({CLOSED})"}


def test_a_store_that_is_gone(pulses: list[pulse.Pulse]) -> None:
    pulses[1].stop()
    assert verdict(pulses[1], CLOSED) == "rank 0 is gone: neither it nor its store can be reached"


def test_the_thread_ends_when_its_process_group_is_no_more(pulses: list[pulse.Pulse]) -> None:
    pulse.dist.group.WORLD = None  # type: ignore[assignment]
    for each in pulses:
        each._thread.join(10)
        assert not each._thread.is_alive()


@pytest.mark.parametrize(
    ("what", "ranks"), [("leave", 2), *(pytest.param(*row, marks=pytest.mark.slow) for row in ENDS)]
)
def test_the_thread_ends_in_silence(what: str, ranks: int) -> None:
    for _, errors, code in run_ranks(ranks, [ROOT / "tests" / "pulse_worker.py", what]):
        assert (code, errors) == (0, "")


def test_a_rank_is_killed_while_another_is_busy() -> None:
    found = run_ranks(RANKS, [ROOT / "tests" / "pulse_worker.py", "busy"])
    for rank, (out, errors, code) in enumerate(found[:-1]):
        assert code == 0, errors
        assert out.startswith(f"rank {rank}: {GONE}. This rank stops"), (out, errors)

"""Each rank counts in the store while it lives: who is busy is told from who is lost, and all survivors say the same.

A rank whose collective fails calls the roll. It finds missing who neither counts on nor calls the roll as well, and
writes that to the store as the verdict, unless there is one: the first counts for all. Every rank looks for it as it
counts, so that it is known even to ranks that are busy until after rank 0, and the store with it, have ended.
"""

import atexit
import contextlib
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist

stores: Any = dist  # has its classes of stores, but HashStore on Windows, and none where torch was built without them
BEAT = 0.5  # seconds from one count to the next
_LEAST = 4 * BEAT  # of grace: to miss a rank takes several counts that did not come
_POLL = 0.05
_END = 2.0  # how long the end of the thread is waited for; it is in the store where the network is cut
_VERDICT = "verdict"
_COUNT, _LEFT, _NOTICED, _HEARD = "count/{}", "left/{}", "noticed/{}", "heard/{}"  # of each rank


class Pulse:
    """The thread in which this rank counts, with a connection of its own to the store of the default process group.

    ``heard`` is the verdict, once it is known here: what survivors say, and the ranks that are lost.
    """

    def __init__(self) -> None:
        self._world = weakref.ref(dist.group.WORLD)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.heard: dict[str, Any] | None = None
        self._store: Any = None
        self._given: Any = dist.distributed_c10d._get_default_store()
        self._open, self._over, self._left = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="upcast-pulse", daemon=True)
        self._thread.start()

    @property
    def current(self) -> bool:
        """Whether the process group is still the one that this was started for."""
        world = self._world()
        return world is not None and world is dist.group.WORLD

    def verdict(self, error: str, ranks: Sequence[int], grace: float) -> str:
        """Return who of ``ranks`` is lost and why, in the words of the first who knew; ``error`` is what this one saw.

        It takes about ``grace`` seconds, and up to as long again on rank 0, with which the store may end.
        """
        grace = max(grace, _LEAST)
        found = self.heard or _bounded(lambda: self._found(error, ranks, grace), 2 * grace) or self.heard
        if found is None:  # the store is on rank 0, or with torchrun where torchrun started first
            return "rank 0 is gone: neither it nor its store can be reached"
        self.heard = found
        self._over.set()  # the thread says that it is heard, and nothing after it: the store may go then
        self.stay(found, grace)
        return str(found["says"])

    def fail(self, reason: str, grace: float) -> dict[str, Any] | None:
        """Have the others say that this rank failed, and why; return the verdict, None if it cannot be told."""
        own = {"says": f"rank {self.rank} failed: {reason}", "lost": [self.rank]}
        found: dict[str, Any] | None = _bounded(lambda: self._tell(self._opened(grace), own), grace)
        return found

    def stay(self, told: dict[str, Any] | None, grace: float) -> None:
        """Wait, on rank 0, until all who live have heard the verdict: it may be the store's home."""
        if self.rank == 0 and told is not None:
            _bounded(lambda: self._wait_for_others(set(range(1, self.size)).difference(told["lost"]), grace), grace)

    def stop(self, left: bool = False) -> None:
        """End the thread; ``left``: this rank has all that it wanted of the others."""
        self._left = left
        self._over.set()
        self._thread.join(_END)
        self._store = None

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            store = self._connect()
            while self.current and not self._over.is_set():
                store.add(_COUNT.format(self.rank), 1)
                if store.check([_VERDICT]):
                    self.heard = json.loads(store.get(_VERDICT))
                    break
                self._over.wait(BEAT)
            if self.current and (self.heard or self._left):  # else the store may be gone, of which torch warns
                store.set((_HEARD if self.heard else _LEFT).format(self.rank), "")
        except Exception:  # the store is gone, and with it whoever would see the count
            return

    def _connect(self) -> Any:
        """Open the store; a store may serve several process groups, one after the other: each has its own keys."""
        given, self._given = self._given, None  # held for longer, it would keep rank 0's port
        own = given.clone() if hasattr(given, "clone") else given  # torch 2.7 has none: it waits while others wait
        time_of_it = own.add(f"upcast/pulses/{self.rank}", 1)
        self._store = stores.PrefixStore(f"upcast/pulse/{time_of_it}", own)
        self._open.set()
        return self._store

    # --- who calls the roll -------------------------------------------------------------------------------------------

    def _opened(self, grace: float) -> Any:
        self._open.wait(grace)
        return self._store

    def _found(self, error: str, ranks: Sequence[int], grace: float) -> dict[str, Any]:
        store = self._opened(grace)
        silence = "imed out" in error or "timeout" in error
        store.set(_NOTICED.format(self.rank), "silence" if silence else "closed")
        missing, busy = self._roll_call(store, ranks, grace)
        if self.heard is not None:
            return self.heard
        # Who gives up waiting closes connections: what it saw counts, not what others saw of it then.
        seen = [store.get(key) for key in map(_NOTICED.format, ranks) if store.check([key])]
        left = [rank for rank in ranks if store.check([_LEFT.format(rank)])]
        return self._tell(store, _worded(missing, left, busy, b"silence" in seen, f"{len(ranks)} live ({error})"))

    def _roll_call(self, store: Any, ranks: Sequence[int], grace: float) -> tuple[list[int], list[int]]:
        """Return who has not noticed anything within ``grace`` seconds: those who do not count on, and those who do."""
        start, waiting = time.monotonic(), [rank for rank in ranks if rank != self.rank]
        before: dict[int, int] = {}
        while waiting and self.heard is None and (passed := time.monotonic() - start) < grace:
            waiting = [
                r for r in waiting if not store.check([_NOTICED.format(r)]) and not store.check([_LEFT.format(r)])
            ]
            if passed < 2 * BEAT:  # a rank that ends may count once more
                before = _counts(store, waiting)
            time.sleep(_POLL)
        if self.heard is not None:
            return [], []
        now = _counts(store, waiting)
        return [r for r in waiting if now[r] == before.get(r)], [r for r in waiting if now[r] != before.get(r)]

    def _tell(self, store: Any, own: dict[str, Any]) -> dict[str, Any]:
        """Make ``own`` the verdict if there is none, and return the one there is."""
        told: dict[str, Any] = json.loads(store.compare_set(_VERDICT, "", json.dumps(own)))
        return told

    def _wait_for_others(self, waiting: set[int], grace: float) -> None:
        store, end = self._store, time.monotonic() + grace
        while waiting and time.monotonic() < end:
            time.sleep(_POLL)
            waiting = {r for r in waiting if not store.check([_HEARD.format(r)]) and not store.check([_LEFT.format(r)])}


def started() -> Pulse:
    """Return the pulse of this process, of which there is one for the default process group."""
    global _current  # noqa: PLW0603 - one per process
    with _lock:
        if _current is None or not _current.current:
            _stop(False)
            _current = Pulse()
        return _current


def stop(left: bool = False) -> None:
    """End the pulse of this process, if there is one; ``left``: not for a failure."""
    with _lock:
        _stop(left)


_current: Pulse | None = None
_lock = threading.Lock()


def _stop(left: bool) -> None:
    global _current  # noqa: PLW0603 - one per process
    if _current is not None:
        _current.stop(left)
        _current = None


def _forget() -> None:
    """After a fork: the thread stayed with the parent, and so does the connection."""
    global _current, _lock  # noqa: PLW0603 - one per process
    _lock = threading.Lock()
    if _current is not None:
        _current._store = None
        _current = None


atexit.register(stop)  # a thread that came back from the store to an interpreter that is gone would end the process
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _counts(store: Any, ranks: Iterable[int]) -> dict[int, int]:
    return {rank: store.add(_COUNT.format(rank), 0) for rank in ranks}


def _worded(
    missing: Sequence[int], left: Sequence[int], busy: Sequence[int], silence: bool, living: str
) -> dict[str, Any]:
    if missing:
        how = "did not answer in time" if silence else "is gone: its connection was closed"
        return {"says": f"rank {_listed(missing)} {how}", "lost": list(missing)}
    if left:
        return {"says": f"rank {_listed(left)} has left: it was done, or waited no longer", "lost": list(left)}
    if busy and silence:
        says = f"rank {_listed(busy)} lives, but did not answer in time: it is busy for longer than the timeout"
        return {"says": says, "lost": []}
    return {"says": f"the ranks cannot reach each other, though all {living}", "lost": []}


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _bounded(task: Callable[[], Any], seconds: float) -> Any:
    """Return what ``task`` returns; None if it fails or takes longer: without a network the store waits for minutes."""
    found: list[Any] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            found.append(task())

    caller = threading.Thread(target=run, name="upcast-roll-call", daemon=True)
    caller.start()
    caller.join(seconds)
    return found[0] if found else None

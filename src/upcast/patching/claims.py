"""One thread at a time changes a model, its parts, and what it is a part of; others get an error.

A claim is on modules, and on the float16 memory of weights, which models may share. It goes with the call that made it,
also where an interruption cuts that call short before it can give the claim up. So would no lock: an interruption may
come between taking it and noting that. Claims are numbered instead, and of those that collide the lowest stands
(Lamport's bakery): who has written down a claim and then its number reads those of the others.
"""

import itertools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import nn

from upcast.core.errors import UpcastError
from upcast.core.module_tree import modules
from upcast.tensor.store import Store

Result = TypeVar("Result")
_PAUSE = 1e-3  # seconds


class _Claim:
    def __init__(self, roots: Iterable[nn.Module], reads: bool) -> None:
        self.key, self.thread, self.roots, self.reads = next(_keys), threading.get_ident(), list(roots), reads
        self.things: dict[int, object] = {}  # held, so that nothing else gets their ids
        self.number: int | None = None  # None while it is yet to be chosen

    def is_made(self, waits: bool) -> bool:
        """Make the claim, or return False where that is to be tried again: for those who only look everybody waits."""
        self.number = None
        _claims[self.key] = weakref.ref(self)
        self._look()
        self.number = 1 + max((other.number or 0 for other in self._others()), default=0)
        barring = [other for other in self._others() if other.bars(self)]
        if barring:
            self.give_up()
        if not waits and not all(other.reads for other in barring):
            names = ", ".join(type(root).__name__ for root in self.roots)
            raise UpcastError(
                f"another thread is patching this {names}, or taking it back, or does so with a part of it or what it "
                "is a part of; one at a time can. Wait for that thread."
            )
        return not barring and not self._finds_more()

    def give_up(self) -> None:
        """Let others have what is claimed; twice is as good as once."""
        _claims.pop(self.key, None)

    def bars(self, other: "_Claim") -> bool:
        """Whether the other one must not be made while this one stands."""
        if self.reads and other.reads:
            return False
        while self.number is None and self._is_alive():
            time.sleep(_PAUSE)
        first = (self.number or 0, self.key) < (other.number or 0, other.key)
        return first and not self.things.keys().isdisjoint(other.things) and self._is_alive()

    def _finds_more(self) -> bool:
        """Whether somebody who has given up by now put in other weights after this one had looked."""
        known = len(self.things)
        self._look()
        return len(self.things) > known

    def _look(self) -> None:
        for module in {module for root in self.roots for module in modules(root)}:
            stores = [getattr(each, "store", None) for each in [*module._parameters.values()]]
            self.things.update({id(each): each for each in (module, *stores) if isinstance(each, (nn.Module, Store))})

    def _others(self) -> list["_Claim"]:
        found = [reference() for reference in _claims.copy().values()]  # a copy is one step
        return [claim for claim in found if claim is not None and claim.thread != self.thread]

    def _is_alive(self) -> bool:
        return self.key in _claims and self.thread in sys._current_frames()


_keys = itertools.count()
_claims: dict[int, "weakref.ref[_Claim]"] = {}


def alone(
    roots: Iterable[nn.Module], action: Callable[[], Result], *, waits: bool = False, reads: bool = False
) -> Result:
    """Return what ``action`` gives, which changes ``roots``, while no other thread changes anything of them.

    ``waits``: for a thread that does. ``reads``: it only looks at them, as others may at the same time.

    Raises:
        UpcastError: another thread changes something of them.
    """
    claim = _Claim(roots, reads)
    try:
        while not claim.is_made(waits):
            time.sleep(_PAUSE)
        result = action()
        claim.give_up()
    except BaseException:
        claim.give_up()
        raise
    return result

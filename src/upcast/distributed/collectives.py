"""The ranks that share a model: sums and gathers between them, and what is said when one of them is lost."""

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from upcast.core.errors import UpcastError
from upcast.distributed import pulse, shared_memory

WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Bytes up to which ranks on other hosts gather and add up for themselves: half the steps of a ring that adds up on its
# way, and each step waits for the network. Two ranks send no more bytes by it, whatever the length.
SHORT = 16 * 1024


class RankError(UpcastError):
    """Ranks cannot go on together: one is lost, has failed, or differs from the others.

    ``broken``: a collective has failed, and no other will succeed.
    """

    broken = False


class LostRank(RankError):
    """A rank is lost, or has failed."""

    broken = True


class Group:
    """Collectives of one process group; each failure becomes a RankError that names the rank and the reason.

    Args:
        process_group: of gloo, on the CPU.
        wire: in which dtype partial sums travel. Below float32 each rank gathers them and adds them up in float32; a
            sum with a value out of the dtype's range is done again in float32, on all ranks alike.
        grace: seconds within which survivors find out who is missing: who does not count in that time (see `pulse`).

    ``calls``, ``seconds`` and ``repeated`` count the collectives, the time in them, and those done again. ``shared`` is
    the memory through which ranks of one host reach each other, after `share`; otherwise everything goes through gloo.
    """

    def __init__(self, process_group: Any, wire: str = "float32", grace: float = 3.0) -> None:
        if wire not in WIRES:
            raise UpcastError(f"wire={wire!r}; it must be one of {', '.join(WIRES)}. Use 'float32'.")
        self._process_group = weakref.ref(process_group)  # a model outlives it: see `leave`
        self.wire, self.grace = wire, grace
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self._ranks = dist.get_process_group_ranks(process_group)  # by their numbers among all
        self.calls, self.seconds, self.repeated = 0, 0.0, 0
        self.shared: shared_memory.Shared | None = None
        if self.size > 1:
            self._pulse = pulse.started()

    @property
    def process_group(self) -> Any:
        """The process group; None after `leave`."""
        return self._process_group()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        return self  # a copy of a model talks to the same ranks

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``, float32, the same bits on every rank. ``x`` may be overwritten."""
        if self.size == 1:
            return x
        x = x.contiguous()
        if self.wire == "float32":
            self._run("sum", self._add_up, x)
            return x
        total = self._gathered(x.to(WIRES[self.wire])).float().sum(0)
        if bool(total.isfinite().all()):
            return total
        self.repeated += 1
        self._run("sum", self._add_up, x)
        return x

    def concatenate(self, x: Tensor, sizes: list[int]) -> Tensor:
        """Return every rank's ``x`` side by side in the last dimension, where rank r has ``sizes[r]`` elements."""
        if self.size == 1:
            return x
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1]))  # gloo gathers equal shapes only
        every = self._gathered(padded.contiguous())
        return torch.cat([part[..., :size] for part, size in zip(every, sizes, strict=True)], -1)

    def agree(self, record: dict[str, str]) -> None:
        """Compare what each rank is about to do.

        Raises:
            RankError: on every rank, the first rank whose record differs from rank 0's, and in what.
        """
        every = self._told("handshake", record)
        for rank, other in enumerate(every):
            for key in sorted(every[0].keys() | other.keys()):
                if other.get(key) != every[0].get(key):
                    raise RankError(
                        f"rank {rank} has {key} {other.get(key)!r}, rank 0 has {every[0].get(key)!r}; all ranks must "
                        "have the same. Give every process the same files, options and version."
                    )

    def share(self) -> None:
        """Share memory where all ranks are on one host and the native kernels run: sums take microseconds then."""
        if self.size == 1:
            return
        given, file = None, -1
        if self.rank == 0:
            with contextlib.suppress(OSError):
                given, file = shared_memory.offer(self.size)
        given = self._told("handshake", given)[0]
        if given is not None and self.rank > 0:
            with contextlib.suppress(OSError):
                file = shared_memory.accept(given)
        mine = None if file < 0 else shared_memory.Shared(file, self.rank, self.size, self._timeout())
        if all(self._told("handshake", mine is not None)):
            self.shared = mine
        elif mine is not None:
            mine.close()

    def explained(self, error: BaseException) -> BaseException:
        """Return the RankError for an error of a collective that was not ours (of gloo), and any other as it is."""
        if self.size == 1 or not isinstance(error, RuntimeError) or "gloo" not in str(error):
            return error
        return LostRank(self._verdict(error))

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one stops for a reason of its own; nothing for a RankError."""
        if self.size == 1 or isinstance(error, RankError):
            return
        try:
            store = dist.distributed_c10d._get_default_store()  # it may live here, and others have to read the reason
            told = self._pulse.fail(str(error) or type(error).__name__, self.grace)
            if self.shared is not None:
                self.shared.close()
            dist.destroy_process_group()  # wakes the others
        except Exception:  # there may be nobody left to tell
            return
        self._pulse.stay(told, self.grace)
        pulse.stop()
        del store

    def _gathered(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.size, *x.shape))
        self._run("gather", self._all_gather, x, out)
        return out

    def _add_up(self, x: Tensor) -> None:
        if self.shared is not None:
            self.shared.sum(x)
        elif self.size == 2 or x.nbytes <= SHORT:
            every = x.new_empty((self.size, *x.shape))
            self._all_gather(x, every)
            torch.sum(every, 0, out=x)
        else:
            dist.all_reduce(x, group=self.process_group)

    def _all_gather(self, x: Tensor, out: Tensor) -> None:
        if self.shared is not None:
            self.shared.gather(x, out)
        else:
            dist.all_gather(list(out.unbind(0)), x, group=self.process_group)

    def _told(self, what: str, thing: Any) -> list[Any]:
        """Return what each rank tells the others."""
        every: list[Any] = [None] * self.size
        self._run(what, dist.all_gather_object, every, thing, self.process_group)
        return every

    def _timeout(self) -> float:
        options = self.process_group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())

    def _run(self, what: str, collective: Callable[..., Any], *args: Any) -> None:
        start = time.perf_counter()
        try:
            collective(*args)
        except (RuntimeError, ValueError) as error:
            raise LostRank(f"{self._verdict(error)} (in {what} {self.calls + 1})") from None
        self.calls += 1
        self.seconds += time.perf_counter() - start

    def _verdict(self, error: BaseException) -> str:
        """Return who is lost and why; the same on all survivors."""
        return f"{self._pulse.verdict(str(error), self._ranks, self.grace)}. {_STOP}"


_STOP = "This rank stops as well; start all of them again"

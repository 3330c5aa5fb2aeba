"""How fast this machine reads memory: what no decoded token can be faster than, as it reads every weight once."""

import time
from collections.abc import Callable

import torch

from upcast import kernels
from upcast.kernels import native

SHAPE = (65536, 2048)  # of float16: 268 MB, more than the caches of the machines that this is for
REPEATS = 3


class Memory:
    """268 MB that are read from end to end, by torch's threads."""

    def __init__(self) -> None:
        self.half = torch.ones(SHAPE, dtype=torch.float16)

    def rate(self) -> float:
        """Return bytes per second of the fastest of some reads, in one and in several streams per thread.

        The several streams are our own kernel's, over a single weight; some processors read them faster.
        """
        x, numbers = torch.ones(1, SHAPE[1]), self.half.view(torch.float32)
        reads: list[Callable[[], object]] = [numbers.sum]
        if kernels.describe().startswith("native"):
            reads.append(lambda: native.linear(x, self.half))
        with torch.inference_mode():
            return self.half.nbytes / min(_seconds(read) for read in REPEATS * reads)


def _seconds(read: Callable[[], object]) -> float:
    begin = time.perf_counter()
    read()
    return time.perf_counter() - begin

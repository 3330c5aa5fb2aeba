"""What this processor does at most: multiply-adds, reads of memory, regions of all threads. For benchmarks."""

import torch
from torch import Tensor

from upcast.kernels import native_library


def multiply_adds(rounds: int) -> int:
    """Keep torch's threads busy with multiply-adds of float32 in registers; return how many operations that was.

    A round is a few nanoseconds. Dividing by the time that this takes gives what no product of matrices exceeds at the
    instruction set in use. A multiply-add is two operations.
    """
    done: int = native_library.native.multiply_adds(rounds, torch.get_num_threads())
    return done


def read_memory(x: Tensor, streams: int) -> None:
    """Read ``x``, a contiguous float32 vector, from end to end, in ``streams`` equal parts side by side per thread."""
    described = x if native_library.exchange else (x.data_ptr(), "float32", "cpu", tuple(x.shape), x.stride(), x)
    native_library.native.read_memory(described, streams, torch.get_num_threads())


def regions(rounds: int, together: bool) -> bool:
    """Have torch's threads begin and end ``rounds`` regions in which they do nothing: what waiting for others costs.

    ``together``: the threads stay at hand between two regions, as within a native call of a whole block, and meet at a
    barrier; otherwise each region takes them from the pool, as an operation by itself does. Returns whether they all
    took part: where another program has one of the cores, the calling thread works alone.
    """
    threads = torch.get_num_threads()
    met: int = native_library.native.regions(rounds, threads, together)
    return met == rounds * (threads - 1)

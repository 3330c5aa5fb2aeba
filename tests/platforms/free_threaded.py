"""The native module under a Python without a GIL, from many threads at once; without torch, which it does not need.

Run by `make wheels`, in an environment that holds a free-threaded wheel.
"""

import ctypes
import importlib.util
import random
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS, ROUNDS = 8, 200
N, K = 37, 50


class Numbers:
    """A C array as the tuple that stands for a tensor."""

    def __init__(self, dtype: str, shape: tuple[int, ...], numbers: list[float]) -> None:
        code = {"float16": "e", "float32": "f", "int64": "q"}[dtype]
        self.format = f"{len(numbers)}{code}"
        self.memory = ctypes.create_string_buffer(struct.pack(self.format, *numbers), struct.calcsize(self.format))
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        self.tensor = (ctypes.addressof(self.memory), dtype, "cpu", shape, tuple(strides))

    def read(self) -> list[float]:
        return list(struct.unpack(self.format, self.memory))


def load() -> Any:
    """The installed module, without the package around it, which imports torch."""
    (path,) = Path(sys.prefix).glob("lib/python3*/site-packages/upcast/kernels/_native.*.so")
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.setup(ValueError, None)
    return module


def together(work: Callable[[int], None]) -> None:
    """Run ``work`` in many threads; raise what one of them raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def products(native: Any) -> None:
    """Every thread gets its own product right, while others change the level and count arguments wrongly."""

    def work(number: int) -> None:
        drawn = random.Random(number)
        w = [drawn.randint(-8, 8) / 8 for _ in range(N * K)]
        x = [drawn.randint(-8, 8) / 4 for _ in range(3 * K)]
        weight, rows = Numbers("float16", (N, K), w), Numbers("float32", (3, K), x)
        wanted = [sum(x[m * K + k] * w[n * K + k] for k in range(K)) for m in range(3) for n in range(N)]
        for turn in range(ROUNDS):
            out = Numbers("float32", (3, N), [0.0] * (3 * N))
            assert native.linear(out.tensor, rows.tensor, weight.tensor, None, None, False, 1) == 0
            assert out.read() == wanted  # eighths and quarters: exact in any order
            assert native.force_level(native.levels()[turn % len(native.levels())])
            assert "float16" in refusal(lambda: native.linear(*[rows.tensor] * 3, None, None, False, 1))

    together(work)


def refusal(call: Callable[[], object]) -> str:
    """What the ValueError of ``call`` says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "none"


def dictionaries(native: Any) -> None:
    """`unchanged` reads dictionaries that others write to."""
    kept = [object() for _ in range(40)]
    shared = dict(enumerate(kept))

    def work(number: int) -> None:
        mine = {str(key): value for key, value in enumerate(kept)}
        for turn in range(ROUNDS * 10):
            if number % 2:
                shared[1000 + turn % 50] = turn
                shared.pop(1000 + (turn * 7) % 50, None)
            else:
                assert native.unchanged(kept, [shared], [], []) in (True, False)
                assert native.unchanged([*kept, kept[0]], [mine], [mine], ["0"])

    together(work)


def counters(native: Any) -> None:
    """Threads meet as ranks do: each sees what the others wrote before."""
    counts = Numbers("int64", (THREADS, 8), [0] * (8 * THREADS))
    seen = [0] * THREADS

    def work(number: int) -> None:
        for turn in range(1, ROUNDS):
            seen[number] = turn
            assert native.meet(counts.tensor, number, 2 * turn - 1, 60_000_000_000) == -1
            assert seen == [turn] * THREADS
            assert native.meet(counts.tensor, number, 2 * turn, 60_000_000_000) == -1

    together(work)


def main() -> None:
    assert not sys._is_gil_enabled(), "a Python with a GIL"  # type: ignore[attr-defined]
    native = load()
    assert not sys._is_gil_enabled(), "the import switched the GIL on"  # type: ignore[attr-defined]
    for test in (products, dictionaries, counters):
        test(native)
        print(f"{test.__name__}: fine on {native.levels()}")


if __name__ == "__main__":
    main()

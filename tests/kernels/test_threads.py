"""Threads: torch's own pool and no other, its count honoured, many callers at once, and after fork."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.kernels.measure import error
from upcast.core.errors import UpcastError
from upcast.kernels import native, reference

torch.manual_seed(0)
X, W, B = torch.randn(24, 512), torch.randn(700, 512).half(), torch.randn(700)

PREAMBLE = """
import os, threading, time, torch
from upcast.kernels import native
x, w = torch.randn(24, 512), torch.randn(700, 512).half()
tasks = lambda: len(os.listdir("/proc/self/task"))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(script: str) -> str:
    """The output of a fresh interpreter, which must not hang."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pool_is_torch_s() -> None:
    pool = native.info()["threads"]
    assert "torch" in pool or "libdispatch" in pool


@linux
def test_one_openmp_library_is_mapped() -> None:
    out = run(
        "native.linear(x, w); torch.mm(x, x.t())\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split('/')[-1]})"
    )
    assert len(eval(out)) == 1, out


@linux
def test_set_num_threads_is_honoured_by_every_call() -> None:
    out = run(
        "torch.set_num_threads(1); before = tasks(); native.linear(x, w); print(tasks() - before)\n"
        "torch.set_num_threads(3); native.linear(x, w); before = tasks()\n"
        "torch.randn(1000, 1000).exp_(); print(tasks() - before)\n"
        "time.sleep(0.6)\n"  # longer than kernels leave a pool alone that a busy machine kept waiting
        "torch.set_num_threads(5); native.linear(x, w); print(tasks() - before)\n"
    )
    alone, torch_added, grown = out.split()
    assert alone == "0"
    assert torch_added == "0"  # torch's own operations use the threads the kernel woke
    assert grown == "2"


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_any_number_of_threads_gives_the_same(isa: str, threads: int) -> None:
    counts = torch.tensor([20, 0, 4])
    experts = torch.randn(3, 700, 512).half()
    q, k = torch.randn(1, 6, 5, 64), torch.randn(1, 2, 900, 64).half()

    def results() -> list[torch.Tensor]:
        return [
            *(native.linear(X[:m], W, B) for m in (0, 1, 3, 24)),
            *(native.matmul(X[:m], W.view(512, 700)) for m in (1, 3, 24)),
            native.embedding(torch.arange(700), W),
            native.grouped_linear(X, experts, counts),
            native.rms_norm(X),
            native.gated(X, X, "silu"),
            native.attention(q, k, k, start=800),
        ]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(threads)
    together = results()
    torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        assert error(one, other.double()) < 1e-6


def test_many_python_threads_at_once() -> None:
    torch.manual_seed(0)
    work = [(torch.randn(m, 512), torch.randn(300 + m, 512).half()) for m in (1, 5, 17, 64)]
    expected = [native.linear(x, w) for x, w in work]
    dual = [native.matmul(x, w.view(512, -1)) for x, w in work]
    wrong: list[int] = []

    def call(index: int) -> None:
        x, w = work[index]
        for _ in range(3):
            same = torch.equal(native.linear(x, w), expected[index])
            if not same or not torch.equal(native.matmul(x, w.view(512, -1)), dual[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_the_interpreter_is_released() -> None:
    """Another thread runs Python code while a kernel is inside a long call."""
    x, w = torch.randn(512, 1024), torch.randn(4096, 1024).half()
    inside, ran = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: inside.wait() and ran.set())
    thread.start()
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody is asked to yield: only a released interpreter lets the thread run
    inside.set()
    native.linear(x, w)
    during = ran.is_set()
    sys.setswitchinterval(switch)
    thread.join(timeout=60)
    assert during


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_fork() -> None:
    """The pool's threads do not exist in the child: waiting for them would hang."""
    out = run(
        "expected = native.linear(x, w)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    one = threading.Thread(target=lambda: native.linear(x, w)); one.start(); one.join()\n"
        "    os._exit(0 if torch.allclose(native.linear(x, w), expected, rtol=1e-5, atol=1e-5) else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print(torch.equal(native.linear(x, w), expected))\n"
    )
    assert out.split() == ["0", "True"]


def test_forcing_a_level_that_cannot_run_is_refused() -> None:
    running = native.info()["isa"]
    with pytest.raises(UpcastError, match="x86-64-v9"):
        native.set_isa("x86-64-v9")
    assert native.info()["isa"] == running


def test_a_missing_library_says_why(tmp_path: Path) -> None:
    """As after an install without a compiler: the note written by the build is the reason given."""
    package, source = tmp_path / "upcast" / "kernels", Path(native.__file__).parents[1]
    for folder in ("kernels", "core"):
        (tmp_path / "upcast" / folder).mkdir(parents=True)
        for file in (source / folder).glob("*.py"):
            (tmp_path / "upcast" / folder / file.name).write_text(file.read_text())
    (package / "native_missing.txt").write_text("no C++ compiler was found when upcast was installed\n")
    (package / "__init__.py").write_text("")
    (tmp_path / "upcast" / "__init__.py").touch()
    script = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, {str(tmp_path)!r})
from upcast.kernels import native
print(native.__file__, native.available(), native.load_error(), native.info()["isa"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    where, loaded, *reason = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert loaded == "False"
    assert " ".join(reason) == "no C++ compiler was found when upcast was installed None"


def test_the_twin_of_kv_append_leaves_a_refused_cache_alone() -> None:
    cache = torch.zeros(1, 1, 2, 2, dtype=torch.float16)
    assert not reference.kv_append(cache, torch.full((1, 1, 1, 2), 1e5), 0)
    assert cache.eq(0).all()

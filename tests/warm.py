"""A process that has imported LitGPT and Transformers, and forks: each child becomes a program of its own.

Importing them takes most of the time of a small program. What a child does is what `python` does with the same
arguments, environment and folder, except that these libraries are there from the start: upcast's start-up hook finds
them in sys.modules. The order of imports and a process's peak of memory are for the fixture `python`.
"""

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn, cast

ROOT = Path(__file__).parents[1]
LIBRARIES = ("litgpt", "litgpt.__main__", "transformers.pipelines", "transformers.models.llama.modeling_llama")
POSSIBLE = sys.platform == "linux"  # elsewhere a fork is not safe


class Warm:
    """The process, begun at the first question."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._ready: bool | None = None

    def ready(self) -> bool:
        """Return whether there is such a process: its libraries are here, and it is alone, not so under qemu."""
        if self._ready is None:
            installed = all(importlib.util.find_spec(name.partition(".")[0]) for name in LIBRARIES)
            self._ready = POSSIBLE and installed and self._begin()
        return self._ready

    def _begin(self) -> bool:
        self._server = _begun()
        assert self._server.stdout
        return self._server.stdout.readline() == "ready\n"

    def run(
        self, arguments: Sequence[str], environments: Sequence[dict[str, str]], folder: Path, timeout: float
    ) -> list["subprocess.CompletedProcess[str]"]:
        """Run ``python *arguments`` in ``folder`` once in each environment, side by side, as subprocess.run does."""
        assert self._server
        assert self._server.stdin
        assert self._server.stdout
        with tempfile.TemporaryDirectory() as place:
            places = [Path(place, str(number)) for number in range(len(environments))]
            asked = {"arguments": [*arguments], "folder": str(folder), "timeout": timeout}
            children = [
                {"environment": variables, "place": str(own)}
                for variables, own in zip(environments, places, strict=True)
            ]
            print(json.dumps({**asked, "children": children}), file=self._server.stdin, flush=True)
            statuses = json.loads(self._server.stdout.readline())
            said = [[(own / name).read_text() for name in ("out", "err")] for own in places]
        if None in statuses:
            raise subprocess.TimeoutExpired([*arguments], timeout, *said[statuses.index(None)])
        return [
            subprocess.CompletedProcess([*arguments], status, *texts)
            for status, texts in zip(statuses, said, strict=True)
        ]

    def end(self) -> None:
        if self._server is not None:
            self._server.communicate("")


def _begun() -> "subprocess.Popen[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.warm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**clean, "HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"},  # NumPy would begin threads
    )


def main() -> None:
    """Fork the children that each line names; write their statuses, or null after their time."""
    answers = os.fdopen(os.dup(1), "w")
    for name in LIBRARIES:
        importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:  # a fork would take this thread only
        return
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for each in asked["children"]:
            children.append(os.fork())
            if children[-1] == 0:
                answers.close()
                _become(Path(asked["folder"]), **each)
                _leave(_execute, asked["arguments"])
        statuses = [_waited(child, asked["timeout"]) for child in children]
        print(json.dumps(statuses), file=answers, flush=True)


def _waited(child: int, timeout: float) -> int | None:
    handle = os.pidfd_open(child)
    in_time = select.select([handle], [], [], timeout)[0]
    os.close(handle)
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if in_time else None


def _become(folder: Path, environment: dict[str, str], place: str) -> None:
    os.setsid()
    _connect(Path(place))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [each for each in sys.path if each not in ("", str(ROOT))]
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    _start_as_python_does()


def _connect(place: Path) -> None:
    """Give the child the files of its outputs, and no input."""
    place.mkdir()
    for number, path, flags in ((0, "/dev/null", os.O_RDONLY), (1, place / "out", 0), (2, place / "err", 0)):
        opened = os.open(path, flags or os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)


def _start_as_python_does() -> None:
    import torch

    import _upcast_startup

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # its library has read the variable of the process that forked
    atexit.unregister(_upcast_startup._say_too_late)
    _upcast_startup._missed.clear()
    _upcast_startup.start()


def _execute(arguments: list[str]) -> None:
    """Run -c CODE, -m MODULE or a script, with what comes after."""
    while arguments[0] == "-W":
        warnings.filterwarnings(cast(Any, arguments[1]))  # an action: "ignore"
        del arguments[:2]
    first, *rest = arguments
    if first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = arguments
        module = sys.modules["__main__"] = ModuleType("__main__")
        module.__dict__["__file__"] = first
        exec(compile(Path(first).read_text(), first, "exec"), module.__dict__)


def _leave(run: Callable[[list[str]], None], arguments: list[str]) -> NoReturn:
    """End as Python ends a program, except that objects are not freed one by one: that takes seconds."""
    status: object = None
    try:
        run(arguments)
    except SystemExit as leaving:
        status = leaving.code
    except BaseException as error:
        trace = _of_the_program(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status = 1
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for those that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(int(status or 0) & 0xFF)


def _of_the_program(trace: TracebackType | None) -> TracebackType | None:
    while trace and trace.tb_frame.f_code.co_filename == main.__code__.co_filename:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()

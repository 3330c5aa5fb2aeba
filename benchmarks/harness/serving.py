"""LitGPT's own server as a child process: started, asked over HTTP, its memory read, and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 300.0  # seconds for a server to come up
UPCAST_ON = {"UPCAST": "1"}

# `litgpt serve` has one worker; this is what it runs (litgpt.deploy.serve.run_server), with a number of them.
WORKERS = """
import sys
from pathlib import Path
from litgpt.deploy.serve import SimpleLitAPI
from litserve import LitServer
if __name__ == "__main__":
    folder, port, workers, *precision = sys.argv[1:]
    api = SimpleLitAPI(Path(folder), None, *(precision or [None]), top_k=1, max_new_tokens=16, api_path="/predict")
    server = LitServer(api, accelerator="cpu", devices=1, workers_per_device=int(workers), timeout=300)
    server.run(port=int(port), generate_client_file=False)
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, as Linux shares them out: PSS in all, of the checkpoint's mapping, and that mapping's RSS.

    ``anonymous`` is what the process has for itself alone, without a file behind it.
    """

    pss: int
    anonymous: int
    checkpoint_pss: int
    checkpoint_rss: int


class Server:
    """A running server: ask it, or look at its processes."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def ask(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """Post JSON and return the JSON that comes back."""
        with self._post(path, content) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def stream(self, path: str, content: dict[str, Any]) -> Iterator[str]:
        """Post JSON and yield the lines that come back, as they come."""
        with self._post(path, content) as response:
            for line in response:
                if line.strip():
                    yield line.decode().strip()

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=PATIENCE)

    def said(self) -> str:
        """Return what the server and its workers have printed."""
        return self.log.read_text()

    def models(self, checkpoint: Path) -> list[Memory]:
        """Return the memory of each process that maps ``checkpoint``'s weights."""
        found = [memory_of(child.pid, checkpoint) for child in psutil.Process(self.process.pid).children(True)]
        return [memory for memory in found if memory.checkpoint_rss]


@contextmanager
def serve(
    arguments: Sequence[str], port: int, log: Path, variables: dict[str, str], patience: float = PATIENCE
) -> Iterator[Server]:
    """Run ``python arguments`` until it answers on ``port``, and end it with all its children afterwards."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**clean, **variables},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(process, port, log, patience)
            yield Server(process, port, log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path, patience: float) -> None:
    """Wait for the health check, which is positive when every worker has its model."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not answer within {patience:.0f} s:\n{log.read_text()[-3000:]}")


def memory_of(pid: int, checkpoint: Path) -> Memory:
    """Return what /proc says about a process; see proc_pid_smaps(5)."""
    total = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    mapped: dict[str, int] = {}
    inside = False
    name = str((checkpoint / "lit_model.pth").resolve())
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(name)
        elif inside:
            for key, value in _fields([line]).items():
                mapped[key] = mapped.get(key, 0) + value
    return Memory(total["Pss"], total["Anonymous"], mapped.get("Pss", 0), mapped.get("Rss", 0))


def _fields(lines: Sequence[str]) -> dict[str, int]:
    """Return field -> bytes for lines such as ``Pss:   12 kB``."""
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, _ in pairs}

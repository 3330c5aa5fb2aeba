"""The process that stands for a wire between two hosts: every frame, in order, not before it is due."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.harness import relay

DELAY, RATE, SIZE = 0.05, 1e6, 1000  # seconds, bit/s, bytes


@pytest.fixture(params=[(DELAY, float("inf")), (0.0, RATE), (DELAY, RATE)], ids=["delay", "rate", "both"])
def wire(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket, float, float]]:
    delay, rate = request.param
    left, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps frames apart, as a device does
    far, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=relay.forward, args=((near.fileno(), far.fileno()), delay, rate))
    thread.start()
    for end in (left, right):
        end.settimeout(10)
    yield left, right, delay, rate
    left.close()  # the end of the wire
    thread.join(timeout=10)
    assert not thread.is_alive()
    for end in (near, far, right):
        end.close()


def test_frames_arrive_in_order_when_due(wire: tuple[socket.socket, socket.socket, float, float]) -> None:
    left, right, delay, rate = wire
    frames = [bytes([number]) * SIZE for number in range(8)]
    start = time.monotonic()
    for frame in frames:
        left.send(frame)
    right.send(b"back")
    assert left.recv(relay.FRAME) == b"back"
    for number, frame in enumerate(frames):
        assert right.recv(relay.FRAME) == frame
        assert time.monotonic() - start >= delay + 8 * SIZE * (number + 1) / rate

"""Two hosts on one machine: network namespaces joined by a veth pair, with limits set by tc (Linux, as root).

Where the kernel has no netem, which delays, a link with a delay is two TAP devices with a process between them
(relay.py).
"""

import fcntl
import functools
import os
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.231.7.1", "10.231.7.2")
_RELAY = Path(__file__).with_name("relay.py")
_MTU = 9000  # of the TAP devices: fewer frames for the process between them
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


@dataclass(frozen=True)
class Link:
    """What is between the hosts: bit/s (None: no limit), and seconds added to each direction."""

    rate: float | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Host:
    """One namespace: what to put before a command to run it there, its address and its interface."""

    prefix: tuple[str, ...]
    address: str
    interface: str


def why_not(delay: bool = False) -> str:
    """Return why this machine cannot do it (with ``delay``: added latency too), or an empty string."""
    if not all(map(shutil.which, ("ip", "tc"))):
        return "ip and tc are not installed (Debian: iproute2)"
    try:
        with hosts(Link(delay=1e-3) if delay else Link()):
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd[:6])} ...: {error.stderr.strip()}"
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"


@contextmanager
def hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Make the two hosts, and take them away again."""
    ends = [f"up{os.getpid() % 10**6}{side}" for side in "ab"]
    join = _relayed if link.delay and not has_netem() else _wired
    with _namespaces() as names, join(names, ends, link):
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _run("ip", "-n", name, "link", "set", device, "up")
        found = [
            Host(("ip", "netns", "exec", name), address, end)
            for name, address, end in zip(names, ADDRESSES, ends, strict=True)
        ]
        yield found[0], found[1]


@functools.cache
def has_netem() -> bool:
    """Whether this kernel can delay packets by itself."""
    with _namespaces() as names:
        command = ("tc", "-n", names[0], "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def _namespaces() -> Iterator[list[str]]:
    names = [f"upcast-{os.getpid()}-{side}" for side in (0, 1)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        yield names
    finally:
        for name in names:  # its devices go with it
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def _wired(names: Sequence[str], ends: Sequence[str], link: Link) -> Iterator[None]:
    """A veth pair; netem delays and limits, and where there is nothing to delay, a token bucket limits."""
    peer = ("peer", "name", ends[1], "netns", names[1])
    _run("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", *peer)
    for name, end in zip(names, ends, strict=True):
        limit: tuple[str, ...] = ()
        if link.delay:
            limit = ("netem", "delay", f"{1e6 * link.delay:.0f}us")
            limit += ("rate", f"{link.rate:.0f}") if link.rate else ()
        elif link.rate:
            burst = str(max(16_000, int(link.rate / 8 / 250)))  # bytes: what passes in one tick of the kernel's clock
            limit = ("tbf", "rate", f"{link.rate:.0f}bit", "burst", burst, "latency", "200ms")
        if limit:
            _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", *limit)
    yield


@contextmanager
def _relayed(names: Sequence[str], ends: Sequence[str], link: Link) -> Iterator[None]:
    """Two TAP devices and a process that carries frames between them."""
    taps = [_tap(end) for end in ends]
    try:
        for name, end in zip(names, ends, strict=True):
            _run("ip", "link", "set", end, "mtu", str(_MTU), "netns", name)
        command = [sys.executable, str(_RELAY), *map(str, taps), str(link.delay), str(link.rate or float("inf"))]
        relay = subprocess.Popen(command, pass_fds=taps)
    finally:
        for tap in taps:
            os.close(tap)
    try:
        yield
    finally:
        relay.kill()
        relay.wait()


def _tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError:
        os.close(tap)
        raise
    return tap


def cut(host: Host) -> None:
    """Cut the network between the hosts: packets are lost, nobody is told."""
    _run("ip", "-n", host.prefix[-1], "link", "set", host.interface, "down")


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def latency(places: Sequence[Host], messages: int = 300) -> float:
    """Return the seconds that a small message takes between the hosts: half the median round trip over TCP."""
    address, script = (places[0].address, "29499"), str(Path(__file__).with_name("pingpong.py"))
    echo = subprocess.Popen(
        [*places[0].prefix, sys.executable, script, "echo", *address], stdout=subprocess.PIPE, text=True
    )
    try:
        assert echo.stdout is not None
        echo.stdout.readline()  # it listens
        ask = [*places[1].prefix, sys.executable, script, "ask", *address, str(messages)]
        trips = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    finally:
        echo.kill()
        echo.communicate()
    return statistics.median(map(float, trips)) / 2

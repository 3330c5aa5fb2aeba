"""Two hosts on one machine: network namespaces joined by a veth pair, with limits set by tc (Linux, as root)."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.231.7.1", "10.231.7.2")


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


@contextmanager
def hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """Make the two hosts, and take them away again."""
    names = [f"upcast-{os.getpid()}-{side}" for side in (0, 1)]
    ends = [f"up{os.getpid() % 10**6}{side}" for side in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run(
            "ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]
        )
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _run("ip", "-n", name, "link", "set", device, "up")
            _limit(name, end, link)
        found = [
            Host(("ip", "netns", "exec", name), address, end)
            for name, address, end in zip(names, ADDRESSES, ends, strict=True)
        ]
        yield found[0], found[1]
    finally:
        for name in names:  # the veth pair goes with them
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def cut(host: Host) -> None:
    """Cut the network between the hosts: packets are lost, nobody is told."""
    _run("ip", "-n", host.prefix[-1], "link", "set", host.interface, "down")


def _limit(name: str, end: str, link: Link) -> None:
    """netem delays and limits; where the kernel lacks it, a token bucket can still limit."""
    if link.delay:
        rate = ("rate", f"{link.rate:.0f}") if link.rate else ()
        _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "netem", "delay", f"{1e6 * link.delay:.0f}us", *rate)
    elif link.rate:
        burst = str(max(16_000, int(link.rate / 8 / 250)))  # bytes: what passes in one tick of the kernel's clock
        limit = ("rate", f"{link.rate:.0f}bit", "burst", burst, "latency", "200ms")
        _run("tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", *limit)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)

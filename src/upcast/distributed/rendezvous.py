"""How a process joins the others: torchrun's variables or one process, with a timeout and names for who is missing."""

import contextlib
import datetime
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from upcast.core import config
from upcast.core.errors import UpcastError
from upcast.distributed import pulse
from upcast.distributed.collectives import Group, RankError
from upcast.distributed.pulse import stores

_JOINED = "upcast/joined"
_MISSING = "upcast/missing"
_STRANDED = "upcast/stranded"
_CLOSING = "upcast/closing"  # in a store of rank 0 that all have left; who joins again waits for the next one
_POLL, _GRACE = 0.05, 3.0  # seconds
_joins = itertools.count()  # of this process


def join(timeout: float = 60.0, environ: Mapping[str, str] = os.environ) -> DeviceMesh:
    """Join the ranks that torchrun started (a single process is rank 0 of 1) and return their mesh on the CPU.

    Args:
        timeout: seconds that a rank waits for the others: to join, and later in each collective.
        environ: the variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them.

    Raises:
        UpcastError: a rank did not join in time (it is named), or a variable is missing or not a number.
    """
    import torch.distributed.nn.functional  # noqa: F401 (imported later it would hold the process group: its defaults)

    place = config.rank_of(environ)
    if dist.is_initialized():
        return init_device_mesh("cpu", (dist.get_world_size(),))
    span = datetime.timedelta(seconds=timeout)
    if place.ranks == 1:
        dist.init_process_group("gloo", store=_own_store(span), rank=0, world_size=1, timeout=span)
        return init_device_mesh("cpu", (1,))
    store = _connect(place, span)
    _wait_for_all(store, place, timeout)
    try:
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.ranks, timeout=span)
    except RuntimeError as error:
        silent = _silent(store, place)
        if silent:
            raise UpcastError(
                f"rank {place.rank} found the others but rank {', '.join(map(str, silent))} is gone since; all must "
                "stay until the end. Start all of them again."
            ) from None
        raise UpcastError(
            f"rank {place.rank} found the others but cannot connect to them ({str(error).splitlines()[0]}); each "
            "host must reach every other. Set GLOO_SOCKET_IFNAME to the network interface between them."
        ) from None
    pulse.started()
    return init_device_mesh("cpu", (place.ranks,))


@contextlib.contextmanager
def joined(timeout: float = 60.0, environ: Mapping[str, str] = os.environ) -> Iterator[DeviceMesh]:
    """`join` for a block and `leave` at its end; if a rank is lost in between, all the others say which, and why.

    An error that leaves the block is told to the other ranks. An error of a collective, ours or not, becomes a
    RankError that names the rank that is gone, silent or has failed, with its reason.

    Args:
        timeout: as for `join`.
        environ: as for `join`.

    Raises:
        UpcastError: as `join` does.
        RankError: another rank is lost, has failed or differs from this one.
    """
    mesh = join(timeout, environ)
    group = Group(mesh.get_group())
    try:
        yield mesh
    except BaseException as error:
        found = group.explained(error)
        group.fail(found)
        if not isinstance(found, RankError):
            raise
        (abandon if found.broken else leave)(mesh)  # gloo's threads must not outlive the interpreter
        raise RankError(f"rank {group.rank}: {found}") from None
    leave(mesh)


def leave(mesh: DeviceMesh) -> None:
    """Close the connections once every rank has come here; the counterpart of `join`, which gave ``mesh``.

    A rank that closed while another was still in its last collective could end that one with it. And a process group
    that something still holds when Python ends takes the process with it: gloo's threads then meet an interpreter
    that is gone ("terminate called without an active exception"). The mesh is the last to hold it.
    """
    if not dist.is_initialized():
        return
    pulse.stop(left=True)  # before the others let go, and rank 0 of its store
    with contextlib.suppress(RuntimeError):  # a rank that died by now takes nothing away
        if dist.get_rank() == 0:
            _base(dist.distributed_c10d._get_default_store()).set(_CLOSING, "")
        dist.barrier()
    abandon(mesh)


def abandon(mesh: DeviceMesh) -> None:
    """Close the connections without waiting for anyone; for a rank that can no longer reach the others."""
    pulse.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    getattr(mesh, "_pg_registry", {}).clear()  # torch keeps it there; older ones know groups by name


def _own_store(span: datetime.timedelta) -> Any:
    """Return a store for a process that is alone; on Windows torch has none that needs no port."""
    if hasattr(stores, "HashStore"):
        return stores.HashStore()
    return stores.TCPStore("127.0.0.1", 0, 1, True, span, wait_for_workers=False, use_libuv=False)


def _connect(place: config.Rank, span: datetime.timedelta) -> Any:
    """Open the store: of torchrun, where it serves one to each join in turn, or of rank 0, a new one each time."""
    if place.served:
        return stores.PrefixStore(f"upcast/{place.attempt}/{next(_joins)}", _opened(place, False, span))
    end = time.monotonic() + span.total_seconds()
    while True:
        store = _opened(place, place.rank == 0, span)
        with contextlib.suppress(RuntimeError):  # it went while it was asked
            if place.rank == 0 or not store.check([_CLOSING]) or time.monotonic() > end:
                return stores.PrefixStore(f"upcast/{place.attempt}", store)
        time.sleep(_POLL)


def _opened(place: config.Rank, host: bool, span: datetime.timedelta) -> Any:
    listening = _listening(place) if host else None
    try:
        return stores.TCPStore(
            place.address,
            place.port,
            place.ranks,
            host,
            span,
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
    except (RuntimeError, ValueError) as error:
        what = "cannot open the store" if host else "cannot reach the store of rank 0"
        raise UpcastError(
            f"rank {place.rank} {what} at {place.address}:{place.port} within {span.total_seconds():g} s "
            f"({str(error).splitlines()[0]}); rank 0 must run there. Check MASTER_ADDR, MASTER_PORT and the firewall."
        ) from None


def _base(store: Any) -> Any:
    """Return the store that ``store`` gives its keys a prefix for."""
    while isinstance(store, stores.PrefixStore):
        store = store.underlying_store
    return store


def _listening(place: config.Rank) -> socket.socket | None:
    """Return a socket that listens at MASTER_ADDR and at no other address of this host, as torch's own would.

    None where the name leads to no address of this host, as through a forwarded port: then torch listens at all.
    """
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM):
            return socket.create_server(address, family=family, backlog=place.ranks + 128)
    return None


def _wait_for_all(store: Any, place: config.Rank, timeout: float) -> None:
    """Wait until every rank has said that it is there."""
    store.set(f"{_JOINED}/{place.rank}", b"1")
    end, waiting = time.monotonic() + timeout, set(range(place.ranks))
    while waiting:
        try:
            waiting -= {rank for rank in waiting if store.check([f"{_JOINED}/{rank}"])}
            missing = store.get(_MISSING).decode() if store.check([_MISSING]) else ""
        except RuntimeError:
            raise UpcastError(
                f"rank 0 is gone before all {place.ranks} ranks had joined; it holds their store. Start all again."
            ) from None
        if waiting and not missing and time.monotonic() > end:
            missing = ", ".join(map(str, sorted(waiting)))
            store.set(_MISSING, missing)  # the first to give up says so to all
            time.sleep(20 * _POLL)  # rank 0 may be the store's home: the others have to read it
        if missing:
            raise UpcastError(
                f"rank {missing} of {place.ranks} did not join within {timeout:g} s; every rank must be started. "
                "Start the missing processes, or wait longer with --timeout."
            )
        time.sleep(_POLL)


def _silent(store: Any, place: config.Rank) -> list[int]:
    """Return the ranks that joined, but do not say with this one that they could not connect."""
    end, silent = time.monotonic() + _GRACE, set(range(place.ranks))
    try:
        store.set(f"{_STRANDED}/{place.rank}", b"1")
        while silent and time.monotonic() < end:
            silent -= {rank for rank in silent if store.check([f"{_STRANDED}/{rank}"])}
            time.sleep(_POLL)
    except RuntimeError:
        return [0]  # the store is on rank 0, or with torchrun where torchrun started first
    time.sleep(10 * _POLL)  # rank 0 may be the store's home: the others have to hear the end
    return sorted(silent)

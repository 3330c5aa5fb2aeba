"""The process of a variant: it answers what the parent asks of its worker."""

import contextlib
import traceback
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness.job import Failure, Job
from benchmarks.harness.transformers_worker import VARIANTS as TRANSFORMERS
from benchmarks.harness.transformers_worker import TransformersWorker
from benchmarks.harness.variants import PEERS
from benchmarks.harness.worker import Worker
from benchmarks.peers.registry import worker_of


def serve(connection: Connection, job: Job) -> None:
    """Answer requests (method name, arguments) until the parent closes the connection or is gone."""
    worker: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            method, arguments = connection.recv()
            try:
                worker = worker or _worker(job)
                answer = getattr(worker, method)(*arguments)
            except Exception as error:  # reported by the parent, which fails the run
                answer = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(answer)


def _worker(job: Job) -> Any:
    if job.variant in TRANSFORMERS:
        return TransformersWorker(job)
    return worker_of(job) if job.variant in PEERS else Worker(job)

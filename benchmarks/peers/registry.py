"""The peers that `--peers` measures, each an optional package."""

from types import ModuleType

from litgpt.config import Config

from benchmarks.harness.job import Job
from benchmarks.harness.variants import LLAMA_CPP, OPENVINO
from benchmarks.peers import llamacpp
from benchmarks.peers import openvino as openvino_peer
from benchmarks.peers.base import PeerWorker

MODULES: dict[str, ModuleType] = {LLAMA_CPP: llamacpp, OPENVINO: openvino_peer}


def worker_of(job: Job) -> PeerWorker:
    """Return the worker of the peer that ``job`` names."""
    return llamacpp.LlamaCppWorker(job) if job.variant == LLAMA_CPP else openvino_peer.OpenVinoWorker(job)


def available(config: Config) -> tuple[list[str], list[str]]:
    """Return the peers that can run this model, and a line for each that cannot."""
    reasons = {name: module.why_not(config) for name, module in MODULES.items()}
    return [name for name in reasons if not reasons[name]], list(dict.fromkeys(filter(None, reasons.values())))

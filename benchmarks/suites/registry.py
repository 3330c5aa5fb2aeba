"""The suites that measure one thing at several sizes, by the name that `run.py --suite` has for them."""

from types import ModuleType

from benchmarks.suites import batches, contexts

SWEEPS: dict[str, ModuleType] = {"contexts": contexts, "batches": batches}

"""What `patch` did to a model, as text to print, and as a picture of its memory layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from upcast.core.errors import UpcastError
from upcast.patching import engine
from upcast.patching.parts import parts_of
from upcast.patching.plan import Change


class Layer(NamedTuple):
    """Bytes of one layer: before the patch, and after it what is stored in float16 and what is not."""

    name: str
    before: int
    float16: int
    rest: int


class Report(str):
    """What `upcast.report` returns: text, which also draws itself.

    >>> print(upcast.report(model))
    >>> upcast.report(model).plot("memory.png")
    """

    changes: Sequence[Change] = ()

    def layers(self) -> list[Layer]:
        """Return the bytes of each layer, in the model's order; what is in no numbered layer is one by its module."""
        found: dict[str, list[Change]] = {}
        for change in self.changes:
            found.setdefault(_layer(change.name), []).append(change)
        return [_sum(name, changes) for name, changes in found.items()]

    def plot(self, path: str | Path) -> Path:
        """Write a picture (PNG) of the bytes of each layer before and after the patch to ``path``, and return it.

        Raises:
            UpcastError: the report is of a piece of a patched model; or matplotlib is not installed
                (pip install 'torch-upcast[plot]').
        """
        if not self.changes:
            raise UpcastError("a report of a piece of a patched model; it counts no bytes. Report the whole model.")
        from upcast.analysis import plots

        plots.memory(self.layers(), path := Path(path))
        return path


def report(model: object) -> Report:
    """Return what `patch` did to ``model`` and what has happened since, as text to print.

    A table of its tensors, the kernels in use, and every operation that needed a whole float32 copy of a weight, with
    the number of calls and the largest copy in bytes. Of a model that is composed of several, one for each part that
    is patched, by its name. ``.plot(path)`` writes a picture of the memory of each layer, before and after.

    Raises:
        UpcastError: the model is not patched, or another thread is at work on it.

    Examples:
        >>> model = upcast.patch(torch.nn.Linear(8, 4).eval())
        >>> report = upcast.report(model)
        >>> print(report)
        tensor  shape  dtype  action ...
        >>> path = report.plot("memory.png")
    """
    found = Report(engine.report(model))
    found.changes = [change for part in parts_of(model) for change in part.record.plan.changes]
    return found


def _layer(name: str) -> str:
    """Return the name up to its first number: model.layers.3 of model.layers.3.mlp.weight; else that of the module."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1]) or name


def _sum(name: str, changes: Sequence[Change]) -> Layer:
    half = sum(change.bytes_after for change in changes if change.in_float16)
    after = sum(change.bytes_after for change in changes)
    return Layer(name, sum(change.bytes_before for change in changes), half, after - half)

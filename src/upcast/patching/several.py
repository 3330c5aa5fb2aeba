"""A pipeline of several models: all of them are patched, or none."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from upcast.core.errors import UpcastError
from upcast.patching.discovery import refs
from upcast.patching.parts import RECORD
from upcast.patching.transaction import Assignments, Record, take_back

Prepared = TypeVar("Prepared")


def check_apart(roots: Mapping[str, nn.Module]) -> None:
    """Raise UpcastError where two of a pipeline's models share a tensor."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    for name, root in roots.items():
        for ref in refs(root):
            other, owner = owners.setdefault(id(ref.tensor), (name, root))
            if owner is not root:
                raise UpcastError(
                    f"{other} and {name} of this pipeline share {ref.name}; patched each for itself, they would no "
                    f"longer. Give each its own, or patch one of them: upcast.patch(pipeline.{other})."
                )


def all_or_none(
    roots: Sequence[nn.Module], prepared: Sequence[Prepared], patch: Callable[[Prepared, Assignments], Record]
) -> list[Record]:
    """Patch one model after the other; where one cannot be, those before it are as they were."""
    originals: list[Assignments] = [[] for _ in roots]
    try:
        records = [patch(each, lent) for each, lent in zip(prepared, originals, strict=True)]
    except BaseException:
        noted = [(root, lent, root.__dict__.get(RECORD)) for root, lent in zip(roots, originals, strict=True)]
        done = [(root, lent, record) for root, lent, record in noted if isinstance(record, Record)]
        done = [(root, lent, record) for root, lent, record in done if record.lent is lent]
        for _, lent, record in done:  # of all of them first: from here on the way leads back, also if it is cut short
            record.originals = lent
        for root, lent, _ in done:
            take_back(root, lent)
        raise
    for record in records:
        record.lent = None
    return records

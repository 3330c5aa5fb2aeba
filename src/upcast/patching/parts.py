"""The patched models inside what users hand over: the model itself, or parts of one that is composed of several."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from upcast.core.errors import UpcastError
from upcast.core.module_tree import modules, named_modules
from upcast.patching.discovery import unwrap

if TYPE_CHECKING:
    from upcast.patching.transaction import Record

RECORD = "_upcast"  # the attribute in which a patched module keeps its Record


class Part(NamedTuple):
    """A module that was given to `patch`, by that or by a loader, and what it is called in what users hand over."""

    name: str
    module: nn.Module
    record: "Record"


def roots_of(model: object) -> dict[str, nn.Module]:
    """Return the modules of what users hand over: one, or those of a Diffusers pipeline by their names.

    Raises:
        UpcastError: there is none.
    """
    components = getattr(model, "components", None)
    if not isinstance(model, nn.Module) and isinstance(components, dict):
        found = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if found:
            return found
    return {"": unwrap(model)}


def parts_of(model: object) -> list[Part]:
    """Return what is patched in ``model``, from the outside in; nothing if it is not patched.

    Raises:
        UpcastError: it is no module, and holds none.
    """
    return list({id(part.module): part for part in _found(roots_of(model))}.values())  # components may share one


def _found(roots: dict[str, nn.Module]) -> Iterator[Part]:
    for prefix, root in roots.items():
        for name, module in named_modules(root):
            record = module.__dict__.get(RECORD)
            if record is not None and record.recover(module):
                yield Part(".".join(filter(None, (prefix, name))), module, record)


def took_back(model: object) -> bool:
    """Take back every patch in ``model`` that was cut short, and its way back too; return whether there was one."""
    inside = [module for root in roots_of(model).values() for module in modules(root)]
    records = [(module, module.__dict__[RECORD]) for module in inside if RECORD in module.__dict__]
    whole = [record.recover(module) for module, record in records]
    return not all(whole)


def patched_parts_of(model: object) -> list[Part]:
    """As `parts_of`, but raise UpcastError if nothing in ``model`` is patched."""
    found = parts_of(model)
    if not found:
        names = ", ".join(type(root).__name__ for root in roots_of(model).values())
        raise UpcastError(
            f"this {names} is not patched by upcast; only a patched model can be. Call upcast.patch(model) first."
        )
    return found

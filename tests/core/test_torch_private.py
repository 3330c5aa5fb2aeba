"""What upcast uses of torch's insides stands in one table: a torch that lacks it is known before a program runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import upcast
from upcast.core import torch_private

SOURCES = sorted(Path(upcast.__file__).parent.rglob("*.py"))
# Modules of torch that are imported where they are used: one that is not there costs what it is imported for.
IMPORTED = {"_C._distributed_c10d", "_decomp", "_inductor", "_subclasses", "jit._trace", "utils._pytree", "ops.aten"}
KNOWN = {name for names in (*torch_private.NEEDED, *torch_private.FAST_PATHS) for name in names.split("|")} | IMPORTED


def chains(path: Path) -> Iterator[str]:
    """Yield the dotted names under torch in a file, each as long as it is written."""
    tree = ast.parse(path.read_text())
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            if name.startswith("torch.") and "(" not in name:
                yield name.removeprefix("torch.")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            yield from (f"{node.module}.{each.name}".removeprefix("torch.") for each in node.names)


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def is_known(name: str) -> bool:
    return any(f"{name}.".startswith(f"{known}.") or known.startswith(f"{name}.") for known in KNOWN)


def test_every_private_name_stands_in_the_table() -> None:
    used = {name for path in SOURCES if path.name != "torch_private.py" for name in chains(path) if is_private(name)}
    assert len(used) > 20
    assert sorted(name for name in used if not is_known(name)) == []


def test_this_torch_has_them_all() -> None:
    assert torch_private.missing(torch_private.NEEDED) == []

"""Write docs/errors.md: every error that upcast raises by itself, read out of the sources.

python tools/errors_page.py
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "upcast"
PAGE = ROOT / "docs" / "errors.md"

SECTIONS = {  # folder of the sources -> what a reader is doing when it happens
    "patching": "Patching a model",
    "tensor": "Using a patched model",
    "integrations": "Loading and converting",
    "checkpoint": "Reading and writing files",
    "policy": "Policies",
    "guard": "Guard and headroom",
    "analysis": "Diagnose, search, ablate, certify",
    "distributed": "Several processes and hosts",
    "kernels": "Kernels",
    "core": "Environment and set-up",
    "cli": "Command line",
    "": "Optional libraries",
}
HEAD = """# Errors

upcast raises one kind of error: `upcast.UpcastError`, a `ValueError`. Its text says what was found, the rule, and the
remedy. When it is raised nothing has been changed. On the command line the same text is the one line on standard error,
and the exit code is 2.

`upcast.distributed.RankError` is an `UpcastError` that names a rank. Errors of other libraries stay their own.

```python
import torch
import upcast

try:
    upcast.patch(torch.nn.Linear(2, 2), policy="saef")
except upcast.UpcastError as error:
    print(error)
```

`tools/errors_page.py` writes this page from the sources; do not edit it. What stands in *italics* is filled in.
"""
SENTENCE = re.compile(r"(?<=[\w)'\"`}])\. (?=[A-Z`{])")  # between a sentence and the next
RAISED = ("UpcastError", "RankError", "KernelError", "LostRank", "_NoSourceError")


@dataclass(frozen=True)
class Entry:
    """One error: what was found, the rule that it breaks, what to do."""

    section: str
    found: str
    rule: str
    remedy: str


def main() -> int:
    """Write the page, and say how many errors it has."""
    found = entries()
    PAGE.write_text(page(found), "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {len(found)} errors")
    return 0


def page(found: list[Entry]) -> str:
    """Return the page of these errors."""
    parts = [HEAD]
    for section in SECTIONS.values():
        rows = [entry for entry in found if entry.section == section]
        if rows:
            parts.append(
                f"## {section}\n\n| what it says | why | what to do |\n|---|---|---|\n{''.join(map(_row, rows))}"
            )
    return "\n".join(parts)


def entries() -> list[Entry]:
    """Return the errors of the sources, in the order of files and lines, each text once."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(SOURCES.rglob("*.py"))}
    constants = {name: text for tree in trees.values() for name, text in _constants(tree).items()}
    found: dict[str, Entry] = {}
    for path, tree in trees.items():
        folder = path.relative_to(SOURCES).parts[0] if path.parent != SOURCES else ""
        for call in calls(tree):
            text = _text(call.args[0], constants)
            if says_something(text):
                found.setdefault(text, _entry(SECTIONS[folder], text))
    return list(found.values())


def counted() -> tuple[int, int]:
    """Return how many errors the sources make with a text of their own, and how many pass on another's."""
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(SOURCES.rglob("*.py"))]
    constants = {name: text for tree in trees for name, text in _constants(tree).items()}
    texts = [_text(call.args[0], constants) for tree in trees for call in calls(tree)]
    return sum(map(says_something, texts)), sum(not says_something(text) for text in texts)


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield every call that makes an error."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RAISED and node.args:
            yield node


def says_something(text: str) -> bool:
    """Return whether an error has a text of its own; one that only passes on another's has nothing but braces."""
    return len(re.sub(r"{[^}]*}|\W", "", text)) > 12


def _constants(tree: ast.Module) -> dict[str, str]:
    """Return the texts that a module keeps under names of its own."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    names = ((node.targets[0], node.value) for node in assigned)
    return {name.id: _text(value, {}) for name, value in names if isinstance(name, ast.Name)}


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return "{" + _placeholder(node) + "}"


def _placeholder(node: ast.expr) -> str:
    """Return a word for what is filled in: the last name of the expression that a reader would know."""
    code = re.sub(r"'[^']*'|__name__|\b(type|str|map|join|self|else|if)\b", "", ast.unparse(node))
    names = re.findall(r"[A-Za-z][A-Za-z_]{2,}", code)
    return names[-1].replace("_", " ") if names else "..."


def _entry(section: str, text: str) -> Entry:
    """Split a text as all are made: "what was found; the rule. The remedy."."""
    text = " ".join(text.split())
    end = SENTENCE.search(text)
    whole, remedy = (text[: end.start()], text[end.end() :]) if end else (text, "")
    found, _, rule = whole.rstrip(".").partition("; " if "; " in whole else ": ")
    if not remedy and not text.endswith("}"):  # the rule says it: "it must be at least 1."
        rule, remedy = "", f"{rule[:1].upper()}{rule[1:]}."
    remedy = remedy or "What it passes on says it."
    return Entry(section, found, rule, remedy)


def _row(entry: Entry) -> str:
    cells = (re.sub(r"([|<*_])", r"\\\1", cell) for cell in (entry.found, entry.rule, entry.remedy))
    cells = (re.sub(r"{([^{}]*)}", r"*\1*", cell) for cell in cells)  # braces at a cell's end mean attributes to MkDocs
    return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main())

"""Runs programs one after the other, each with the same seed, and writes what each found and said.

usage: runner.py FOLDER RESULTS FILE.PROGRAM..., where FOLDER holds the checkpoints and RESULTS is a file to write
"""

import ast
import contextlib
import importlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.programs import checkpoints

HERE = Path(__file__).parent


def names(file: str) -> list[str]:
    """Return the programs of a file as FILE.PROGRAM: its public functions, without importing it."""
    functions = [
        each for each in ast.parse((HERE / f"{file}.py").read_text()).body if isinstance(each, ast.FunctionDef)
    ]
    return [f"{file}.{each.name}" for each in functions if not each.name.startswith("_")]


def run(program: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    """Return what ``program`` found as plain numbers and texts, its error, the lines it said, what it loaded."""
    torch.manual_seed(0)
    checkpoints.LOADED.clear()
    found: dict[str, Any] = {"found": None, "error": None}
    with _listening() as heard:
        try:
            found["found"] = plain(program(folder))
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
    return {
        **found,
        "said": [line for line in heard.getvalue().splitlines() if "upcast" in line],
        "loaded": list(checkpoints.LOADED),
    }


@contextlib.contextmanager
def _listening() -> Iterator[io.StringIO]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as heard:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)
        yield heard


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: a tensor as its dtype, shape and numbers."""
    if isinstance(value, torch.Tensor):
        return {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "numbers": value.detach().double().flatten().tolist(),
        }
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def main() -> None:
    """Run the programs named, and write a line for each when it begins and when it has ended."""
    folder, results, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    with results.open("a", buffering=1) as lines:
        for name in wanted:
            file, _, program = name.partition(".")
            print(json.dumps([name, None]), file=lines)
            found = run(getattr(importlib.import_module(f"tests.programs.{file}"), program), folder)
            print(json.dumps([name, found]), file=lines)


if __name__ == "__main__":
    main()

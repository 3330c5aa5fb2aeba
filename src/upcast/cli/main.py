"""The command line: ``python -m upcast check | run | convert | generate | diagnose | certify | status``.

Exit codes: 0 when the command did its work, 1 when nobody takes its output or the module to run is not there, 2 for
what the user should change, with one line on standard error, 130 when it is interrupted.
"""

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import _upcast_startup
from upcast.cli import analysis as commands_on_models
from upcast.cli import check, generate, tune
from upcast.core.about import DISTRIBUTION, VERSION
from upcast.core.errors import UpcastError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code (2 for a usage error, with one line on standard error)."""
    arguments = _parser().parse_args(argv)
    try:
        import upcast.api
        import upcast.integrations  # noqa: F401 - they register themselves; --help needs neither them nor torch

        return int(arguments.command(arguments))
    except UpcastError as error:
        print(f"upcast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upcast",
        description="float16 weights, float32 math, no NaNs, for PyTorch models on the CPU.",
        epilog="In code: upcast.patch(model). For any program: UPCAST=1 python program.py. Exit codes: 0 done, 1 the "
        "output went nowhere, 2 something to correct, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check.add(commands)

    run = commands.add_parser(
        "run",
        help="run a Python program as if UPCAST=1 were set",
        description="Run a Python program with what LitGPT, Transformers and Diffusers load patched, as UPCAST=1 does, "
        "without relying on upcast's start-up file.",
    )
    run.add_argument("-m", dest="module", action="store_true", help="TARGET is a module, as in python -m")
    run.add_argument("target", metavar="TARGET", help="a script, or with -m a module")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    run.set_defaults(command=_run)

    _add_convert(commands)

    generate.add_to(commands)

    status = commands.add_parser("status", help="say what is active and why")
    status.add_argument("--json", action="store_true", help="as JSON, for a bug report")
    status.set_defaults(command=_status)

    tune.add(commands)
    commands_on_models.add(commands)
    return parser


def _add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = commands.add_parser(
        "convert",
        help="write a float16 or packed copy of a checkpoint, or a packed one back",
        description="Write a copy of a checkpoint folder that is mapped and shared as it is, instead of being rounded "
        "or packed at every start. float16 (of LitGPT): weights are rounded to float16; what float16 cannot hold stays "
        "in float32. packed (of LitGPT or Transformers): bfloat16 numbers take 12 bits each, and no bit changes; only "
        "upcast reads such a folder. bfloat16: a packed folder becomes the ordinary one that it was, bit for bit. "
        "Streams tensor by tensor, goes on where it was interrupted, reads back what it wrote, and takes its final "
        "name when it is whole.",
    )
    convert.add_argument("checkpoint_dir", metavar="CHECKPOINT_DIR", type=Path, help="a checkpoint folder")
    convert.add_argument("--output", metavar="DIR", type=Path, help="the new folder (default: CHECKPOINT_DIR-STORAGE)")
    convert.add_argument(
        "--storage",
        choices=("float16", "packed", "bfloat16"),
        default="float16",
        help="what the copy holds (default: float16)",
    )
    convert.set_defaults(command=_convert)


def _run(arguments: argparse.Namespace) -> int:
    from upcast.core import config

    os.environ["UPCAST"] = "1"  # child processes too
    config.read()  # an unknown value stops here, not in the middle of the program
    _upcast_startup.start()
    sys.argv = [arguments.target, *arguments.arguments]
    if arguments.module:
        sys.path.insert(0, os.getcwd())
        missing = _no_module(arguments.target)
        if missing:
            print(f"{sys.executable}: {missing}", file=sys.stderr)  # as Python says it
            return 1
        runpy.run_module(arguments.target, run_name="__main__", alter_sys=True)
        return 0
    script = Path(arguments.target)
    if not script.is_file():
        raise UpcastError(f"no file {script}; run takes a Python script, or -m and a module. Check the path.")
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _no_module(name: str) -> str:
    """Return why a module cannot be run as ``python -m`` does, in its words, or an empty string."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            main = importlib.util.find_spec(f"{name}.__main__")
            package = f"No module named {name}.__main__; {name!r} is a package and cannot be directly executed"
            return "" if main is not None else package
    except (ImportError, ValueError) as error:
        return f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})"
    return "" if spec is not None else f"No module named {name}"


def _convert(arguments: argparse.Namespace) -> int:
    from upcast.core import console
    from upcast.integrations import convert_packed
    from upcast.integrations.litgpt import convert

    ways = {"float16": convert.convert, "packed": convert_packed.pack, "bfloat16": convert_packed.unpack}
    try:
        return console.answer(ways[arguments.storage](arguments.checkpoint_dir, arguments.output))
    except KeyboardInterrupt:
        print("upcast: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _status(arguments: argparse.Namespace) -> int:
    import json

    from upcast.cli import status
    from upcast.core import console

    return console.answer(json.dumps(status.facts(), indent=1) if arguments.json else console.listing(status.rows()))

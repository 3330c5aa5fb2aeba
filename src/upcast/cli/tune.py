"""``python -m upcast tune``: measure how this machine reads weights best, and keep the result for later processes."""

import argparse
import datetime
import json


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser(
        "tune",
        help="measure how this machine reads weights best, in seconds",
        description="Measure how this processor reads float16 weights fastest and from how many rows on torch's own "
        "products are faster than upcast's, in about five seconds, and keep the result: later processes go by it. "
        "Run it while the machine has nothing else to do, with as many threads as your programs. Until then upcast's "
        "own table counts.",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and say, keep nothing")
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    parser.set_defaults(command=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from upcast import kernels
    from upcast.core import console
    from upcast.kernels import native, tune, tuning

    kernels.active()  # at the level that the environment asks for
    with console.Progress(tune.PARTS, "measuring", "part") as progress:
        found, figures = tune.measure(progress.advance)
    figures["measured"] = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    file = None if arguments.dry_run else tuning.save(found, figures)
    if arguments.json:
        answer = {**found._asdict(), **figures, "processor": tuning.processor(), "level": native.level()}
        return console.answer(json.dumps({**answer, "file": None if file is None else str(file)}, indent=1))
    rates, ratios = figures["gigabytes_per_second"], figures["torch_over_native"]
    lines = [(reading, f"{rate:.1f} GB/s of weights for one row") for reading, rate in rates.items()]
    lines += [(f"{rows} rows", f"torch's product takes {ratio:.2f} of ours") for rows, ratio in ratios.items()]
    lines += [("chosen", f"{found.reading}, {_products(found.torch_rows)}")]
    lines += [("kept in", "nothing (--dry-run)" if file is None else f"{file}; later processes go by it")]
    return console.answer(console.listing(lines))


def _products(rows: int) -> str:
    return f"torch's products from {rows} rows on" if rows else "upcast's own products for any number of rows"

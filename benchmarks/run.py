"""Measure what upcast costs and what it gives, against float32 and the other ways to run a model on CPU.

python benchmarks/run.py                        SmolLM2-135M-Instruct, real weights: under five minutes
python benchmarks/run.py --quick                the same, under one minute
python benchmarks/run.py --model pythia-160m    any LitGPT config, seeded random weights
python benchmarks/run.py --model Mixtral-shaped --variants float32,upcast    a mixture of experts of 3 GB
python benchmarks/run.py --peers                llama.cpp and OpenVINO as well (pip install llama-cpp-python openvino)
python benchmarks/run.py --suite serve          LitGPT as a server: requests, shared memory, time to the first token
python benchmarks/run.py --suite contexts       prompts of 512 to 32,000 tokens, beside the peers that are there
python benchmarks/run.py --suite batches        1 to 32 sequences at once, in LitGPT, Transformers, llama.cpp
python benchmarks/run.py --suite ablation       which op classes need float32
python benchmarks/run.py --suite training       fine-tuning: memory and time of a step, 200 steps beside float32's
python benchmarks/run.py --suite distributed    one and two ranks, and two hosts in network namespaces
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: make `benchmarks` importable

import torch
from litgpt.config import Config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.harness import chart, machine, record, report, roofline, stress, subject, sweep
from benchmarks.harness.session import FULL, QUICK, Effort, Rates, Result, job_for, measure, started
from benchmarks.harness.variants import BASELINE, VARIANTS
from benchmarks.models import mixtures, smollm2
from benchmarks.peers import registry as peers
from benchmarks.suites import ablation
from benchmarks.suites import distributed as distributed_suite
from benchmarks.suites import serve as serve_suite
from benchmarks.suites import training as training_suite
from benchmarks.suites.registry import SWEEPS

SUITES = ("variants", "serve", "contexts", "batches", "ablation", "training", "distributed")
DEFAULT_OUTPUT = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 if a variant failed. Wrong options exit with 2."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    effort = chosen_effort(options)
    if options.suite == "serve":
        return serve(parser, options, effort)
    if options.suite in SWEEPS:
        return sweep_over(parser, options)
    if options.suite == "distributed":
        return distribute(parser, options, effort)
    if options.suite == "training":
        return training_suite.main(options.output, options.quick, options.threads)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="upcast-benchmark-") as scratch:
        try:
            measured = subject.resolve(options.model, options.checkpoint, Path(scratch), effort.window, effort.windows)
        except (subject.SubjectError, smollm2.PreparationError) as error:
            parser.error(str(error))
        if options.suite == "ablation":
            return ablation.run(measured, options.output)
        skipped = stress.why_not(Config.from_checkpoint(measured.checkpoint))
        if options.peers:
            found, missing = peers.available(Config.from_checkpoint(measured.checkpoint))
            if not found:
                parser.error(f"--peers: {'; '.join(missing)}")
            print(*(f"--peers: {each}" for each in missing), sep="\n", end="\n" * bool(missing), file=sys.stderr)
            options.variants = [*options.variants, *found]
        results, rates = run_variants(measured, options, effort, skipped, Path(scratch))
        content = record.record(measured, effort, results, skipped, time.perf_counter() - begin, rates)
    show(measured, effort, results, skipped)
    write(options.output, content)
    return int(any(result.failure for result in results.values()))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        default=smollm2.MODEL,
        help=f"a LitGPT config name, or {' or '.join(mixtures.NAMES)} (3 GB in float16, 6 in float32); random weights "
        "unless %(default)s (the default)",
    )
    source.add_argument("--checkpoint", type=Path, metavar="DIR", help="a LitGPT checkpoint folder")
    parser.add_argument("--suite", choices=SUITES, default=SUITES[0], help="what to measure (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and less text: under one minute")
    parser.add_argument("--variants", type=variant_names, default=list(VARIANTS), metavar="A,B,...", help=VARIANTS_HELP)
    parser.add_argument("--peers", action="store_true", help="measure llama.cpp and OpenVINO too, on the same weights")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads per variant (default: torch's)")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help=f"default {FULL.rounds}, with --quick {QUICK.rounds}"
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="default benchmarks/results")
    return parser


VARIANTS_HELP = f"of {', '.join(VARIANTS)}; {BASELINE} is the baseline and always measured (default: all)"


def variant_names(text: str) -> list[str]:
    """Parse `a,b,c` into names in the table's order, the baseline included."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in VARIANTS]
    if unknown or not asked:
        found = ", ".join(unknown) or "no name"
        raise argparse.ArgumentTypeError(f"{found}: not a variant; choose from {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in asked or name == BASELINE]


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is needed")
    return int(text)


def chosen_effort(options: argparse.Namespace) -> Effort:
    effort = QUICK if options.quick else FULL
    return replace(effort, rounds=options.rounds) if options.rounds else effort


def run_variants(
    measured: subject.Subject, options: argparse.Namespace, effort: Effort, skipped: str | None, scratch: Path
) -> tuple[dict[str, Result], Rates]:
    """Return the results, and what the machine did at most in each round."""
    if options.threads:
        torch.set_num_threads(options.threads)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    jobs = [job_for(measured, name, options.threads, scratch) for name in options.variants]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Starting one process per variant", total=1.0)

        def notice(description: str, share: float) -> None:
            progress.update(task, description=description, completed=share)

        with started(jobs) as session:
            return measure(session, effort, skipped is None, notice), session.rates


def show(measured: subject.Subject, effort: Effort, results: dict[str, Result], skipped: str | None) -> None:
    # Not narrower than the tables, also where the output is no terminal.
    console = Console()
    console.width = max(console.width, report.WIDTH)
    context = report.Context(
        title=measured.title,
        weights=measured.weights,
        text=measured.text,
        machine=machine.cpu_model(),
        threads=next((result.threads for result in results.values() if result.threads), None),
        rounds=effort.rounds,
        tokenizer=subject.has_tokenizer(measured.checkpoint),
        skipped_stress=skipped,
    )
    console.print(report.render(results, context))


def serve(parser: argparse.ArgumentParser, options: argparse.Namespace, effort: Effort) -> int:
    """Run the serve suite; return 0, or 1 if a server failed or answered something else than float32's."""
    load = serve_suite.QUICK if options.quick else serve_suite.FULL
    with tempfile.TemporaryDirectory(prefix="upcast-benchmark-") as scratch:
        try:
            measured = subject.resolve(options.model, options.checkpoint, Path(scratch), effort.window, effort.windows)
        except (subject.SubjectError, smollm2.PreparationError) as error:
            parser.error(str(error))
        if not subject.has_tokenizer(measured.checkpoint):
            parser.error(
                f"{measured.title} has no tokenizer; a server needs one. Use --checkpoint with a whole folder."
            )
        try:
            with Console(stderr=True).status("") as status:
                results = serve_suite.run(measured, load, Path(scratch), status.update)
        except (serve_suite.ServeError, RuntimeError) as error:
            print(f"serve: {error}", file=sys.stderr)
            return 1
    serve_suite.show(measured, load, results)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{measured.title}-serve.json"
    path.write_text(json.dumps(serve_suite.record(measured, load, results), indent=1, allow_nan=False) + "\n")
    print(path)
    return 0


def sweep_over(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Run the suite of contexts or batches; return 0, or 1 if a variant failed."""
    suite = SWEEPS[options.suite]
    effort = suite.QUICK if options.quick else suite.FULL
    effort = effort._replace(rounds=options.rounds or effort.rounds)
    with tempfile.TemporaryDirectory(prefix="upcast-benchmark-") as scratch:
        try:
            measured = subject.resolve(options.model, options.checkpoint, Path(scratch), FULL.window, FULL.windows)
        except (subject.SubjectError, smollm2.PreparationError) as error:
            parser.error(str(error))
        try:
            with Console(stderr=True).status("") as status:
                results, rates, missing = suite.run(measured, effort, options.threads, Path(scratch), status.update)
        except sweep.SweepError as error:
            print(f"{options.suite}: {error}", file=sys.stderr)
            return 1
    print(*missing, sep="\n", end="\n" * bool(missing), file=sys.stderr)
    sweep.show(measured.title, suite.table(results), rates)
    content = sweep.record(options.suite, measured.title, effort.new_tokens, options.threads, results, rates)
    print(sweep.write(options.output, content))
    return 0


def distribute(parser: argparse.ArgumentParser, options: argparse.Namespace, effort: Effort) -> int:
    """Run the distributed suite; return 0, or 1 if a rank failed."""
    tokens = 32 if options.quick else 128
    with tempfile.TemporaryDirectory(prefix="upcast-benchmark-") as scratch:
        try:
            measured = subject.resolve(options.model, options.checkpoint, Path(scratch), effort.window, effort.windows)
        except (subject.SubjectError, smollm2.PreparationError) as error:
            parser.error(str(error))
        try:
            runs, left_out = distributed_suite.run(measured.checkpoint, tokens)
        except distributed_suite.DistributedError as error:
            print(f"distributed: {error}", file=sys.stderr)
            return 1
    distributed_suite.show(runs, left_out)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{measured.title}-distributed.json"
    content = distributed_suite.record(measured.title, tokens, runs, left_out)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"{path}\n{distributed_suite.draw(content, path.with_suffix('.png'))}")
    return 0


def write(output: Path, content: dict[str, object]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    model = content["subject"]["model"]  # type: ignore[index]
    path = output / f"{model}.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    pictures = [chart.draw(content, path.with_suffix(".png")), roofline.draw(content, roofline.beside(path))]
    print("", path, *filter(None, pictures), sep="\n")


if __name__ == "__main__":
    sys.exit(main())

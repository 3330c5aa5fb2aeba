"""What a person reads in the terminal: two tables that share their rows, and the notes below them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.harness.job import StressOutcome
from benchmarks.harness.session import Result
from benchmarks.harness.subject import PROMPT_TOKENS
from benchmarks.harness.variants import BASELINE, about

WIDTH = 120
NOTHING = "-"
NAME_WIDTH = 17
OURS = ("upcast", "upcast-packed")


@dataclass(frozen=True)
class Context:
    """What the tables say about the run as a whole."""

    title: str
    weights: str
    text: str
    machine: str
    threads: int | None
    rounds: int
    tokenizer: bool
    skipped_stress: str | None  # why the stress test was not run


Number = Callable[[Result], float | None]


@dataclass(frozen=True)
class Cost:
    """A column of the first table: a number in the title's unit."""

    title: str
    number: Number
    form: str


def _timing(name: str, convert: Callable[[float], float]) -> Number:
    def number(result: Result) -> float | None:
        summary = result.timing(name)
        return convert(summary.median) if summary else None

    return number


def prefill_rate(seconds: float) -> float:
    """Tokens per second of a prefill of `PROMPT_TOKENS` tokens."""
    return PROMPT_TOKENS / seconds


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


COSTS = (
    Cost("weights\nMB", lambda r: _megabytes(r.loading.weight_bytes) if r.loading else None, "{:,.0f}"),
    Cost("peak RSS\nloading MB", lambda r: _megabytes(r.loading.peak_bytes) if r.loading else None, "{:,.0f}"),
    Cost("steady RSS\nMB", lambda r: _megabytes(r.steady_bytes), "{:,.0f}"),
    Cost("prefill\ntokens/s", _timing("prefill", prefill_rate), "{:,.0f}"),
    Cost("decode\nms/token", _timing("decode", lambda seconds: 1e3 * seconds), "{:,.1f}"),
    Cost("first token\nms", _timing("first_token", lambda seconds: 1e3 * seconds), "{:,.0f}"),
)


def render(results: dict[str, Result], context: Context) -> Group:
    """Return everything the terminal shows at the end; fits `WIDTH` columns."""
    heading = Text(f"\n{context.title}", style="bold")
    heading.append(f"   {context.weights}", style="not bold")
    setting = Text(f"{context.machine}, {context.threads or '?'} threads, {context.rounds} rounds", style="dim")
    parts: list[RenderableType] = [heading, setting, cost_table(results), worth_table(results, context)]
    return Group(*parts, *notes(results, context))


def cost_table(results: dict[str, Result]) -> Table:
    """Memory and speed: medians, and their ratio to float32's."""
    table = _table("What it costs", [cost.title for cost in COSTS])
    baseline = results.get(BASELINE)
    for result in results.values():
        cells = [_with_ratio(cost, result, baseline) for cost in COSTS]
        table.add_row(result.variant, *cells, style=_row_style(result))
    return table


def _with_ratio(cost: Cost, result: Result, baseline: Result | None) -> str:
    value = cost.number(result)
    if value is None:
        return NOTHING
    reference = cost.number(baseline) if baseline else None
    ratio = f" {value / reference:4.2f}x" if reference else ""
    return cost.form.format(value) + ratio


def worth_table(results: dict[str, Result], context: Context) -> Table:
    """Quality against float32, the stress test, and the verdict."""
    scales = sorted({outcome.scale for result in results.values() for outcome in result.stress})
    titles = ["logits\nerror", "KL\nnats", "top-1\nagrees", "perplexity"]
    titles += [f"stress\nx{scale}" for scale in scales] + ["same\nanswer", "verdict"]
    table = _table("What it is worth, against float32 on the same weights", titles)
    answer = results[BASELINE].answer if BASELINE in results else None
    for result in results.values():
        by_scale = {outcome.scale: outcome for outcome in result.stress}
        stressed = [stress_cell(by_scale[scale]) if scale in by_scale else NOTHING for scale in scales]
        same = agreement_cell(result.answer, answer)
        cells = quality_cells(result, context.tokenizer) + stressed + [same, verdict(result)]
        table.add_row(result.variant, *cells, style=_row_style(result))
    return table


def quality_cells(result: Result, tokenizer: bool) -> list[str | Text]:
    """Logits error, KL, top-1 agreement, perplexity."""
    quality = result.quality
    if quality is None:
        return [NOTHING] * 4
    if quality.nonfinite_share:
        return [Text("NaN", style="bold red")] * 4
    agreement = 100 * (quality.top1_agreement or 0.0)
    perplexity = f"{quality.perplexity:.3f}" if tokenizer else NOTHING
    return [small(quality.relative_error), small(quality.kl), f"{agreement:.1f} %", perplexity]


def small(value: float | None) -> str:
    """A number that spans magnitudes; zero is exact and says so."""
    if value is None:
        return NOTHING
    return f"{value:.1e}" if value else "0"


def stress_cell(outcome: StressOutcome) -> Text:
    """The logits error; `NaN` where no logit is finite, with the share where only some are not."""
    if outcome.nonfinite_share:
        share = "" if outcome.nonfinite_share == 1 else f"{100 * outcome.nonfinite_share:.0f}% "
        return Text(f"{share}NaN", style="bold red")
    return Text(small(outcome.relative_error))


def agreement_cell(answer: Sequence[int] | None, reference: Sequence[int] | None) -> str:
    """How many greedy tokens agree before the first that does not."""
    if answer is None or reference is None:
        return NOTHING
    return f"{common_prefix(answer, reference)}/{len(reference)}"


def common_prefix(left: Iterable[int], right: Iterable[int]) -> int:
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count


def verdict(result: Result) -> Text:
    if result.status == "failed":
        return Text("FAILED", style="bold red")
    if result.status == "non-finite":
        return Text("NaN", style="bold red")
    if any(outcome.nonfinite_share for outcome in result.stress):
        return Text("overflows", style="red")
    return Text("ok", style="green")


def notes(results: dict[str, Result], context: Context) -> list[Text]:
    """What the tables leave out: failures with their reasons, skipped parts, what the words mean."""
    failed = [result for result in results.values() if result.failure]
    lines = [Text(f"{result.variant} FAILED: {result.failure}", style="bold red") for result in failed]
    if context.skipped_stress:
        lines.append(Text(f"stress test skipped: {context.skipped_stress}", style="yellow"))
    lines.append(Text())
    lines += [Text(f"{name:<{NAME_WIDTH}} {about(name)}", style="dim") for name in results]
    lines += [Text(f"{term:<{NAME_WIDTH}} {meaning}", style="dim") for term, meaning in terms(context).items()]
    return lines


def terms(context: Context) -> dict[str, str]:
    """The meaning of the columns; each fits the table's width."""
    return {
        "figures": "medians of interleaved rounds; x: ratio to float32; RSS: above the imported libraries",
        "prefill": f"{PROMPT_TOKENS} tokens at once; first token, decode: greedy answer to a short prompt",
        "logits": f"text: {context.text}",
        "stress": "share of logits that overflow, or their error; residual stream times 2^k, eps times 4^k,",
        "": "which changes no bit of the logits in float32",
    }


def _table(title: str, columns: list[str]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("variant", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _row_style(result: Result) -> str:
    return "bold" if result.variant in OURS else ""

"""The precision certificate: what a model's numbers are worth under upcast, bfloat16 and plain float16.

Each variant is a copy of the model, judged against float32 on the same text, one window at a time: relative error of
the logits, KL divergence KL(float32 || variant) per position in nats, top-1 agreement, perplexity, and whether greedy
decoding goes the same way; beside them bytes of weights and speed.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from upcast.analysis.result import Result, Table
from upcast.analysis.runner import answer
from upcast.core import console, messages
from upcast.core.errors import UpcastError
from upcast.patching import engine
from upcast.patching.discovery import unwrap
from upcast.patching.plan import PACK, plan
from upcast.policy import fingerprint
from upcast.policy import policy as policies
from upcast.tensor.half_weight import HalfWeight

PACKED = "upcast packed"  # only where something of the model can be packed
VARIANTS = ("upcast", PACKED, "bfloat16", "float16")
ROWS_AT_ONCE = 64  # float64 log-probabilities of 64 positions x 50k tokens: 25 MB


@dataclass(frozen=True)
class Row:
    """One variant against float32; figures that need finite logits are None when some are not.

    Attributes:
        error: norm of the logits' difference over the norm of float32's.
        kl: mean KL divergence over all positions, in nats; kl_99: its 99th percentile; kl_worst: its maximum.
        top1: share of positions with the same most likely token.
        perplexity: on the text itself.
        greedy: share of greedily decoded tokens that are float32's.
        nonfinite: share of logits that are NaN or infinite.
        weight_bytes: parameters and buffers, shared storage once.
        tokens_per_second: positions per second, the median over windows.
        times_float32: how many times as fast as float32 on the same window a moment later, the median over windows.
    """

    variant: str
    error: float | None
    kl: float | None
    kl_99: float | None
    kl_worst: float | None
    top1: float | None
    perplexity: float | None
    greedy: float | None
    nonfinite: float
    weight_bytes: int
    tokens_per_second: float
    times_float32: float


@dataclass(frozen=True)
class Certificate(Result):
    """The rows, float32 first. Printing it gives a table.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
        >>> certificate = upcast.certify(model, list(range(1, 65)), window=16, windows=2, greedy=4)
        >>> certificate.rows[0].variant
        'float32'
        >>> text = certificate.to_markdown()
    """

    model: str
    architecture: dict[str, Any]
    policy: str
    positions: int
    decoded: int
    threads: int
    rows: tuple[Row, ...]

    HEADERS = (
        *("variant", "logits error", "KL mean", "KL 99%", "KL worst", "top-1", "perplexity", "greedy"),
        *("weights", "tokens/s", "speed"),
    )

    def _title(self) -> str:
        return (
            f"{self.model}: {self.positions:,} positions, {self.decoded} tokens decoded greedily, "
            f"{self.threads} threads, upcast policy {self.policy}"
        )

    def _table(self) -> Table:
        return Table(self.HEADERS, [_cells(row) for row in self.rows], right=range(1, 11))

    def _content(self) -> dict[str, Any]:
        return asdict(self)

    def _draw(self, path: Path) -> None:
        from upcast.analysis import plots

        plots.certificate(self, path)


def certify(
    model: object,
    text: str | Tensor | Sequence[int],
    *,
    tokenizer: Any = None,
    policy: policies.Choice = "safe",
    window: int = 256,
    windows: int = 8,
    greedy: int = 16,
) -> Certificate:
    """Compare upcast, bfloat16 and plain float16 with float32 on a text.

    A model whose weights are bfloat16's numbers gets a row for ``storage="packed"`` as well. The model is copied for
    each variant, one at a time beside the original; it is not changed.

    Args:
        model: a causal language model on the CPU, patched or not: called with token ids (1, T), it gives logits.
        text: text, or token ids: a list, or a tensor of shape (T,) or (1, T).
        tokenizer: what encodes the text; not needed for token ids nor for a litgpt ``LLM``.
        policy: upcast's policy, as for `upcast.patch`.
        window: positions per forward pass.
        windows: how many of them at most.
        greedy: tokens to decode after the first 32 of the text.

    Raises:
        UpcastError: the text is too short or there is no tokenizer; ids on another device; a window that is no positive
            number; the model is no causal language model, fails in float32, or its logits there are not finite.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model").eval()
        >>> ids = list(range(1, 65))  # or a text, with tokenizer=
        >>> certificate = upcast.certify(model, ids, window=16, windows=2, greedy=4)
        >>> print(certificate)
        LlamaForCausalLM...
    """
    root, ids = unwrap(model), _encode(model, text, tokenizer)
    for name, value, least in (("window", window, 1), ("windows", windows, 1), ("greedy", greedy, 0)):
        if value < least:
            raise UpcastError(f"{name} is {value}; it must be at least {least}.")
    pieces = list(_windows(ids, window, windows))
    prompt = ids[:32]
    names = [name for name in VARIANTS if name != PACKED or _packs(root)]
    with torch.no_grad(), console.Progress((1 + len(names)) * len(pieces), unit="window") as progress:
        progress.phase("float32")
        reference = _Reference(root, pieces, prompt, greedy, progress)
        rows = [reference.row]
        for name in names:
            progress.phase(name)
            variant = _variant(root, name, policy)
            rows.append(_judged(name, variant, reference, progress))
            del variant
    return Certificate(
        model=type(root).__name__,
        architecture=fingerprint.of(root),
        policy=str(policies.resolve(policy)),
        positions=sum(len(piece) - 1 for piece in pieces),
        decoded=greedy,
        threads=torch.get_num_threads(),
        rows=tuple(rows),
    )


def _encode(model: Any, text: str | Tensor | Sequence[int], tokenizer: Any) -> Tensor:
    if isinstance(text, Tensor) and text.device.type != "cpu":
        raise UpcastError(f"the token ids are on {text.device}; upcast computes on the CPU. Move them with .to('cpu').")
    if not isinstance(text, str):
        ids = torch.as_tensor(text).reshape(-1)
    else:
        tokenizer = tokenizer or getattr(getattr(model, "preprocessor", None), "tokenizer", None)
        if tokenizer is None:
            raise UpcastError("text without a tokenizer; give tokenizer=, or token ids instead of the text.")
        ids = torch.as_tensor(tokenizer.encode(text)).reshape(-1)
    if ids.is_floating_point() or ids.numel() < 34:
        raise UpcastError(f"{ids.numel()} tokens; at least 34 token ids are needed to compare. Give a longer text.")
    return ids.long()


def _windows(ids: Tensor, window: int, windows: int) -> Iterator[Tensor]:
    for start in range(0, min(len(ids), window * windows), window):
        piece = ids[start : start + window + 1]  # the last one is a target only
        if len(piece) > 1:
            yield piece


def _plain(root: nn.Module) -> nn.Module:
    """Return a copy of the model as it was before any patch."""
    model = copy.deepcopy(root)
    if any(isinstance(parameter, HalfWeight) for parameter in model.parameters()):
        with messages.silent():
            engine.unpatch(model)
    return model.eval()


def _packs(root: nn.Module) -> bool:
    """Whether a number of the model can be packed, which says that it comes from a bfloat16 checkpoint."""
    return any(change.action == PACK for change in plan(_plain(root), storage="packed").changes)


def _variant(root: nn.Module, name: str, policy: policies.Choice) -> nn.Module:
    model = _plain(root)
    if name in ("upcast", PACKED):
        with messages.silent():
            return engine.patch(model, policy=policies.stored(policy, "packed" if name == PACKED else None))
    return model.to(getattr(torch, name))


class _Reference:
    """Float32's answers: its row, its greedy continuation, and its logits, one window at a time."""

    def __init__(
        self, root: nn.Module, pieces: list[Tensor], prompt: Tensor, greedy: int, progress: console.Progress
    ) -> None:
        self.model, self.pieces, self.prompt, self.greedy = _plain(root).float(), pieces, prompt, greedy
        self.seconds = 0.0  # that the last window took
        self.logits(pieces[0])  # also warms up, before anything is timed
        self.continuation = _decode(self.model, prompt, greedy)
        self.row = _judged("float32", self.model, self, progress)

    def logits(self, piece: Tensor) -> Tensor:
        """Return float32's logits (T, vocabulary) for a window."""
        begin = time.perf_counter()
        logits = self._attempt(piece[:-1])
        self.seconds = time.perf_counter() - begin
        if not bool(logits.isfinite().all()):
            raise UpcastError(
                f"{type(self.model).__name__} is not finite in float32 already; there is nothing to compare with. "
                "Run upcast.diagnose(model, ids) to see where."
            )
        if logits.dim() != 2 or len(logits) != len(piece) - 1 or int(piece.max()) >= logits.shape[1]:
            raise UpcastError(
                f"{type(self.model).__name__} gives a tensor of shape {tuple(logits.shape)} for {len(piece) - 1} token "
                f"ids up to {int(piece.max())}; a causal language model gives logits (positions, vocabulary), which a "
                "certificate compares. For other models use upcast.ablate or upcast.search."
            )
        return logits

    def _attempt(self, ids: Tensor) -> Tensor:
        try:
            return _logits(self.model, ids)
        except UpcastError:
            raise
        except Exception as error:
            raise UpcastError(
                f"{type(self.model).__name__} fails in float32 already, on {len(ids)} token ids: "
                f"{type(error).__name__}: {error}. It must be a causal language model whose context and vocabulary "
                "hold them; window= is how many are given at once."
            ) from error


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = answer(model(ids[None]))
    return logits[0].float()


class _Sums:
    """What is added up over the windows of one variant."""

    def __init__(self) -> None:
        self.positions, self.agreed = 0, 0
        self.squares = self.norms = self.bad = self.nll = 0.0
        self.divergences: list[Tensor] = []
        self.seconds: list[float] = []  # per position
        self.ratios: list[float] = []

    def timed(self, seconds: float, reference: float, positions: int) -> None:
        """Add how long one window took, and how long float32 took for it in the same moment."""
        self.seconds.append(seconds / positions)
        self.ratios.append(reference / seconds)

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Add one window: logits and reference (T, vocabulary), the tokens that follow (T,)."""
        self.positions += len(logits)
        self.bad += float((~logits.isfinite()).sum()) / logits.shape[1]
        for rows in torch.arange(len(logits)).split(ROWS_AT_ONCE):
            ours, theirs = logits[rows].double(), reference[rows].double()
            self.squares += float((ours - theirs).square().sum())
            self.norms += float(theirs.square().sum())
            self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            self.nll += float(nn.functional.cross_entropy(ours, targets[rows], reduction="sum"))
            self.divergences.append(_kl(ours, theirs))

    def row(self, variant: str, greedy: float, weight_bytes: int) -> Row:
        """Return the figures."""
        rest = (self.bad / self.positions, weight_bytes, 1 / median(self.seconds), median(self.ratios))
        if self.bad:
            return Row(variant, None, None, None, None, None, None, greedy, *rest)
        kl = torch.cat(self.divergences)
        mean, most, worst = float(kl.mean()), float(kl.quantile(0.99)), float(kl.max())
        perplexity = math.exp(self.nll / self.positions)
        error = math.sqrt(self.squares / self.norms)
        return Row(variant, error, mean, most, worst, self.agreed / self.positions, perplexity, greedy, *rest)


def _judged(name: str, model: nn.Module, reference: _Reference, progress: console.Progress) -> Row:
    sums = _Sums()
    for piece in reference.pieces:
        begin = time.perf_counter()
        logits = _logits(model, piece[:-1])
        seconds = time.perf_counter() - begin
        sums.add(logits, reference.logits(piece), piece[1:])
        sums.timed(seconds, seconds if model is reference.model else reference.seconds, len(piece) - 1)
        progress.advance()
    decoded = _decode(model, reference.prompt, reference.greedy)
    same = sum(a == b for a, b in zip(decoded, reference.continuation, strict=True)) / max(len(decoded), 1)
    return sums.row(name, same, _bytes(model))


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference || logits) per position, in nats; both (positions, vocabulary), float64."""
    theirs, ours = reference.log_softmax(-1), logits.log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0.0)  # round-off can leave -1e-17


def _decode(model: nn.Module, prompt: Tensor, count: int) -> list[int]:
    """Return ``count`` greedily decoded tokens, without a cache: for any model; it stops where logits are NaN."""
    ids = prompt
    for _ in range(count):
        last = _logits(model, ids)[-1]
        token = -1 if bool(last.isnan().any()) else int(last.argmax())
        if token < 0:
            break
        ids = torch.cat([ids, torch.tensor([token])])
    found: list[int] = ids[len(prompt) :].tolist()
    return found + [-1] * (count - len(found))


def _bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers; shared storage counts once."""
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held = tensor.store.bytes if isinstance(tensor, HalfWeight) and tensor.store.held else None
        plain = tensor.memory() if isinstance(tensor, HalfWeight) and held is None else tensor
        storage = (plain if held is None else held).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _cells(row: Row) -> tuple[str, ...]:
    show: Callable[[float | None, str], str] = lambda value, form: "NaN" if value is None else form.format(value)  # noqa: E731
    return (
        row.variant,
        *(show(value, "{:.1e}") for value in (row.error, row.kl, row.kl_99, row.kl_worst)),
        show(row.top1, "{:.2%}"),
        show(row.perplexity, "{:.4f}"),
        show(row.greedy, "{:.0%}"),
        console.megabytes(row.weight_bytes),
        f"{row.tokens_per_second:,.0f}",
        f"{row.times_float32:.2f}x",
    )

"""What a variant's logits are worth, against float32's logits on the same tokens and weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 64  # float64 log-probabilities of 64 positions x 50k tokens: 25 MB


@dataclass(frozen=True)
class Quality:
    """Figures over all positions; those that need finite logits are None when some are not."""

    positions: int
    nonfinite_share: float  # of all logits
    relative_error: float | None  # root mean square of the difference over that of the reference
    largest_error: float | None  # largest difference of one logit
    kl: float | None  # mean over positions of KL(reference || variant), in nats
    top1_agreement: float | None  # share of positions with the same most likely token
    perplexity: float | None  # on the tokens themselves


def nonfinite_share(logits: Tensor) -> float:
    """Share of the values in `logits` that are NaN or infinite."""
    return 1.0 - logits.isfinite().double().mean().item()


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of `reference`, in float64."""
    difference = torch.linalg.vector_norm(logits.double() - reference.double())
    return float(difference / torch.linalg.vector_norm(reference.double()))


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || logits) per position, in nats, in float64; shapes (positions, vocabulary)."""
    theirs, ours = (values.double().log_softmax(-1) for values in (reference, logits))
    # Round-off can leave -1e-17 where the two are equal; the divergence is never negative.
    return (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0.0)


def assess(logits: Tensor, reference: Tensor, targets: Tensor) -> Quality:
    """Compare `logits` with `reference`, both (positions, vocabulary), given the tokens that follow.

    `targets`, shape (positions,), holds the true next token of each position, or -100 where there is none.
    """
    share = nonfinite_share(logits)
    if share > 0:
        return Quality(len(logits), share, None, None, None, None, None)
    kl, agreed, nll = 0.0, 0, 0.0
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        ours, theirs = logits[rows], reference[rows]
        kl += kl_divergence(ours, theirs).sum().item()
        agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        nll += torch.nn.functional.cross_entropy(ours.double(), targets[rows], reduction="sum").item()
    positions, known = len(logits), int((targets != -100).sum())
    return Quality(
        positions=positions,
        nonfinite_share=share,
        relative_error=relative_error(logits, reference),
        largest_error=(logits.double() - reference.double()).abs().max().item(),
        kl=kl / positions,
        top1_agreement=agreed / positions,
        perplexity=float(torch.tensor(nll / known).exp()),
    )

"""What is measured: a checkpoint folder and the tokens that go through it."""

import hashlib
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from litgpt.config import Config, name_to_config
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config

from benchmarks.models import mixtures, smollm2
from upcast.core import pages

QUESTION = "What do llamas eat?"
PROMPT_TOKENS = 128
SEED = 1


@dataclass(frozen=True)
class Subject:
    """A checkpoint with its inputs as token ids."""

    title: str
    weights: str  # where the weights come from
    text: str  # where the tokens come from
    checkpoint: Path
    prompt: tuple[int, ...]  # prefill and decoding
    chat: tuple[int, ...]  # the short question of the first-token time and of the answer
    windows: tuple[tuple[int, ...], ...]  # independent stretches of text for the logits

    def decode(self, tokens: list[int]) -> str | None:
        """The text of `tokens`, or None where the checkpoint has no tokenizer."""
        if not has_tokenizer(self.checkpoint):
            return None
        return str(Tokenizer(self.checkpoint).decode(torch.tensor(tokens)))


class SubjectError(ValueError):
    """A model or checkpoint that cannot be measured, with what was found, the rule and the remedy."""


def resolve(model: str, checkpoint: Path | None, scratch: Path, window: int, windows: int) -> Subject:
    """Return the subject that the options name; a model with random weights is written into `scratch`."""
    if checkpoint is not None:
        return _read(check_checkpoint(checkpoint), f"weights of {checkpoint.name}", window, windows)
    if model == smollm2.MODEL:
        return _read(smollm2.prepare(), f"real weights ({smollm2.REQUIREMENT}), float16", window, windows)
    if model in mixtures.NAMES:
        folder = write_random_checkpoint(mixtures.config_of(model), scratch, torch.bfloat16)
        return _read(folder, f"random weights (synthetic, seed {SEED}), bfloat16's numbers", window, windows)
    if model not in name_to_config:
        close = [name for name in (*mixtures.NAMES, *name_to_config) if model.lower() in name.lower()][:5]
        hint = f"Did you mean {', '.join(close)}?" if close else "`litgpt download list` prints the names."
        raise SubjectError(f"--model {model}: no such LitGPT config; the name must be one. {hint}")
    folder = write_random_checkpoint(Config.from_name(model), scratch)
    return _read(folder, f"random weights (synthetic, seed {SEED}), float16", window, windows)


def check_checkpoint(folder: Path) -> Path:
    """Return `folder` when it holds what LitGPT needs; raise `SubjectError` with what is missing."""
    remedy = "Make one with `litgpt download` or `litgpt convert_to_litgpt`."
    if not folder.is_dir():
        raise SubjectError(f"--checkpoint {folder}: no such folder; a LitGPT checkpoint folder is needed. {remedy}")
    missing = [name for name in ("lit_model.pth", "model_config.yaml") if not (folder / name).is_file()]
    if missing:
        raise SubjectError(
            f"--checkpoint {folder}: no {' and no '.join(missing)}; LitGPT's folders have both. {remedy}"
        )
    return folder


def write_random_checkpoint(config: Config, scratch: Path, born: torch.dtype = torch.float32) -> Path:
    """Write a float16 checkpoint folder of LitGPT's model of ``config``, no tokenizer; weights are random, seeded.

    ``born``: the dtype whose numbers they are.
    """
    folder = scratch / str(config.name)
    folder.mkdir()
    torch.manual_seed(SEED)
    gpt = GPT(config)
    gpt.apply(gpt._init_weights)
    torch.save(gpt.to(born).half().state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    return folder


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _read(folder: Path, weights: str, window: int, windows: int) -> Subject:
    pages.advise(folder / "lit_model.pth")  # other programs push a file out, and it comes back in small ones
    config = Config.from_checkpoint(folder)
    needed = PROMPT_TOKENS + window * windows
    if has_tokenizer(folder):
        tokenizer = Tokenizer(folder)
        style = load_prompt_style(folder) if has_prompt_style(folder) else PromptStyle.from_config(config)
        chat = tokenizer.encode(str(style.apply(QUESTION))).tolist()
        # Eight characters a token are more than English text ever takes.
        stream = tokenizer.encode(topics_text()[: 8 * needed], bos=False).tolist()
        text = "pydoc_data.topics"
    else:
        generator = torch.Generator().manual_seed(SEED)
        stream = torch.randint(config.vocab_size, (needed,), generator=generator).tolist()
        chat, text = stream[:32], "random tokens: the folder has no tokenizer"
    starts = range(PROMPT_TOKENS, needed, window)
    pieces = tuple(tuple(stream[start : start + window]) for start in starts)
    return Subject(config.name, weights, text, folder, tuple(stream[:PROMPT_TOKENS]), tuple(chat), pieces)


def topics_text() -> str:
    """The text of Python's own help topics: real English and code, on every machine that has Python."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def fingerprint(subject: Subject) -> str:
    """SHA-256 of all token ids: Python versions differ in their help texts, and so in the perplexity."""
    tokens = (*subject.prompt, *subject.chat, *(token for window in subject.windows for token in window))
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()

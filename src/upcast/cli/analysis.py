"""``python -m upcast diagnose`` and ``certify``: on a checkpoint folder of LitGPT or Transformers."""

import argparse
from pathlib import Path
from typing import Any

from upcast.cli import checkpoints
from upcast.core import console
from upcast.core.errors import UpcastError

PLAIN_TEXT = "pydoc_data.topics"  # real English and code, on every machine that has Python


def add(commands: Any) -> None:
    """Add both commands to the command line's subparsers."""
    diagnose = commands.add_parser(
        "diagnose",
        help="say where a model overflows float16, and which operation breaks it",
        description="Run a model once in float32 and once in plain float16, and say how far each operation is from "
        "float16's end, which one breaks it, and which policy is likely to be enough.",
    )
    _checkpoint(diagnose)
    diagnose.add_argument("prompt", metavar="PROMPT", help="the text to run it on")
    diagnose.add_argument(
        "--tolerance", type=float, default=0.1, help="relative error that counts as drift (%(default)s)"
    )
    diagnose.add_argument("--search", action="store_true", help="also search the smallest sufficient policy")
    diagnose.add_argument("--save", type=Path, metavar="FILE", help="with --search: save the policy, for UPCAST_POLICY")
    _outputs(diagnose)
    diagnose.set_defaults(command=_diagnose)

    certify = commands.add_parser(
        "certify",
        help="compare upcast, bfloat16 and plain float16 with float32 on a text",
        description="Print the precision certificate of a causal language model: logits error, KL divergence, top-1 "
        "agreement, perplexity and greedy agreement with float32, beside memory and speed.",
    )
    _checkpoint(certify)
    certify.add_argument("--text", type=Path, metavar="FILE", help=f"a text file (default: the text of {PLAIN_TEXT})")
    certify.add_argument("--policy", default="safe", help="upcast's policy (%(default)s)")
    certify.add_argument("--window", type=int, default=256, help="positions per pass (%(default)s)")
    certify.add_argument("--windows", type=int, default=8, help="how many passes at most (%(default)s)")
    certify.add_argument("--greedy", type=int, default=16, help="tokens to decode (%(default)s)")
    certify.add_argument("--markdown", type=Path, metavar="FILE", help="write the table in Markdown")
    _outputs(certify)
    certify.set_defaults(command=_certify)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder of LitGPT or Transformers")


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (PNG)")


def _diagnose(arguments: argparse.Namespace) -> int:
    import torch

    from upcast.analysis.diagnose import diagnose
    from upcast.analysis.search import search

    model, tokenizer = checkpoints.load(arguments.checkpoint)
    ids = torch.as_tensor(tokenizer.encode(arguments.prompt)).long().reshape(-1)
    inputs = checkpoints.sample(model, ids)
    found = diagnose(model, inputs, tolerance=arguments.tolerance)
    code = console.answer(found)
    _write(arguments, found)
    if arguments.search or arguments.save:
        policy = search(model, inputs)
        code = max(code, console.answer(policy))
        if arguments.save:
            policy.to_json(arguments.save)
    return code


def _certify(arguments: argparse.Namespace) -> int:
    from upcast.analysis.certify import certify
    from upcast.policy import policy

    policy.resolve(arguments.policy)  # a typo is told before a model is loaded
    text = plain_text() if arguments.text is None else _read(arguments.text)
    model, tokenizer = checkpoints.load(arguments.checkpoint)
    sizes = {"window": arguments.window, "windows": arguments.windows, "greedy": arguments.greedy}
    text = text[: 8 * arguments.window * (arguments.windows + 1)]  # a token is hardly ever longer than 8 characters
    certificate = certify(model, text, tokenizer=tokenizer, policy=arguments.policy, **sizes)
    code = console.answer(certificate)
    if arguments.markdown is not None:
        arguments.markdown.write_text(certificate.to_markdown() + "\n")
    _write(arguments, certificate)
    return code


def _write(arguments: argparse.Namespace, found: Any) -> None:
    if arguments.json is not None:
        found.to_json(arguments.json)
    if arguments.plot is not None:
        found.plot(arguments.plot)


def plain_text() -> str:
    """Return real English and code, which every Python has."""
    import pydoc_data.topics

    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UpcastError(f"text file {path}: {error}; it must be readable text. Check the path.") from None

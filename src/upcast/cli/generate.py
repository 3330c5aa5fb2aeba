"""``python -m upcast generate``: text from a LitGPT checkpoint, by one process or by as many as torchrun starts."""

import argparse
import time
from pathlib import Path
from typing import Any

from upcast.core import config, console, messages
from upcast.core.errors import UpcastError

WIRES = ("float32", "bfloat16", "float16")  # of `upcast.distributed.collectives`, which imports torch


def add_to(commands: Any) -> None:
    """Add the command and its options to the subparsers ``commands``."""
    parser = commands.add_parser(
        "generate",
        help="generate text from a LitGPT checkpoint, on one process or several",
        description="Generate text from a LitGPT checkpoint folder. Started by torchrun --nproc-per-node N (and "
        "--nnodes, for several hosts) -m upcast generate ..., the model is divided between the N processes: each "
        "takes only its part of the weights. Rank 0 prints the text.",
    )
    parser.add_argument("checkpoint_dir", metavar="CHECKPOINT_DIR", type=Path, help="a LitGPT checkpoint folder")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest (default: all)")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (default: 1234)")
    parser.add_argument("--kv-cache", choices=config.KV_CACHES, default="float16", help="default: float16")
    parser.add_argument(
        "--storage",
        choices=config.STORAGES,
        help="packed: weights of a bfloat16 checkpoint in 12 bits (default: float16)",
    )
    parser.add_argument(
        "--wire",
        choices=WIRES,
        default="float32",
        help="dtype of partial sums between ranks (default: float32; smaller ones are less exact)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long a rank waits for the others, at the start and in each sum (default: 60)",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Join the other ranks, load, generate and print; raise UpcastError when a rank is lost or fails."""
    from upcast.distributed.rendezvous import joined

    with joined(arguments.timeout) as mesh:
        return _generate(arguments, mesh if mesh.size() > 1 else None, mesh.get_rank())


def _generate(arguments: argparse.Namespace, mesh: Any, rank: int) -> int:
    if arguments.max_new_tokens < 1:
        raise UpcastError(f"--max-new-tokens {arguments.max_new_tokens}; it must be at least 1.")
    import torch
    from litgpt.generate.base import generate

    from upcast.integrations.litgpt import load

    model = load.load_litgpt(
        arguments.checkpoint_dir,
        kv_cache=arguments.kv_cache,
        storage=arguments.storage,
        mesh=mesh,
        wire=arguments.wire,
    )
    tokenizer, ids = _encoded(arguments.checkpoint_dir, arguments.prompt, model.config)
    size = len(ids) + arguments.max_new_tokens
    if size > model.max_seq_length:
        raise UpcastError(
            f"{len(ids)} tokens of prompt and {arguments.max_new_tokens} new ones; this model takes at most "
            f"{model.max_seq_length} in all. Shorten the prompt, or lower --max-new-tokens."
        )
    torch.manual_seed(arguments.seed)  # every rank draws the same tokens
    with torch.inference_mode():
        model.max_seq_length = size
        model.set_kv_cache(1)
        start = time.perf_counter()
        sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "eos_id": tokenizer.eos_id}
        tokens = generate(model, ids, size, **sampling)
        seconds = time.perf_counter() - start
    if rank:
        return 0
    code = console.answer(tokenizer.decode(tokens))
    messages.say(_figures(model, len(tokens) - len(ids), seconds))
    return code


def _encoded(folder: Path, prompt: str, settings: Any) -> tuple[Any, Any]:
    """Return the tokenizer and the prompt's tokens (T,), in the prompt style of the checkpoint."""
    from litgpt import PromptStyle, Tokenizer
    from litgpt.prompts import has_prompt_style, load_prompt_style

    tokenizer = Tokenizer(folder)
    style = load_prompt_style(folder) if has_prompt_style(folder) else PromptStyle.from_config(settings)
    return tokenizer, tokenizer.encode(style.apply(prompt))


def _figures(model: Any, count: int, seconds: float) -> str:
    line = f"{count} tokens in {seconds:.2f} s, the prompt included"
    group = model.__dict__.get("parallel_group")
    if group is None:
        return line
    each = 1e6 * group.seconds / max(group.calls, 1)
    return (
        f"{line}; rank 0 of {group.size} spent {group.seconds:.2f} s in {group.calls} collectives, {each:.0f} us each"
    )

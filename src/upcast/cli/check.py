"""``python -m upcast check FOLDER``: does it overflow, what will upcast do, how large, how fast, what next."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from upcast.cli import analysis, checkpoints
from upcast.core import console, messages

STEPS = ("reading", "in float32 and in float16", "patching", "timing")
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 64, 16, 3


def add(commands: Any) -> None:
    """Add the command to the subparsers ``commands``."""
    parser = commands.add_parser(
        "check",
        help="say whether a checkpoint overflows in float16, and what upcast makes of it here",
        description="Load a checkpoint folder of LitGPT or Transformers, run it on some text, and say: whether plain "
        "float16 overflows, what upcast stores in which dtype, how much memory that takes, how fast it decodes on this "
        "machine (measured), and which command to run next.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="FOLDER", help="a folder of LitGPT or Transformers")
    parser.add_argument("--text", metavar="TEXT", help="the text to run it on (default: some English)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the checkpoint and print the findings."""
    import torch

    text = arguments.text or analysis.plain_text()[:2000]
    with console.Progress(len(STEPS), unit="step") as progress:
        progress.phase(STEPS[0])
        model, tokenizer = checkpoints.load(arguments.checkpoint)
        ids = torch.as_tensor(tokenizer.encode(text)).long().reshape(-1)[: min(PROMPT_TOKENS, _room(model))]
        found = measure(model, ids, progress)
    found["checkpoint"] = _what(arguments.checkpoint, model)
    found["next"] = _next(arguments.checkpoint, found)
    return console.answer(json.dumps(found, indent=1) if arguments.json else console.listing(_rows(found)))


def _room(model: Any) -> int:
    """Return how many positions there are for a prompt."""
    positions = getattr(model, "max_seq_length", None) or getattr(model.config, "max_position_embeddings", None)
    return max((positions or PROMPT_TOKENS + NEW_TOKENS + 1) - NEW_TOKENS - 1, 1)


def measure(model: Any, ids: Any, progress: console.Progress) -> dict[str, Any]:
    """Return what there is to say of ``model``, which is patched afterwards; ``ids`` (T,) are run through it."""
    from upcast import kernels
    from upcast.analysis.diagnose import diagnose
    from upcast.patching import engine
    from upcast.patching.plan import plan

    progress.advance()
    progress.phase(STEPS[1])
    planned, packed = plan(model), plan(model, storage="packed")
    seen = diagnose(model, checkpoints.sample(model, ids))
    progress.advance()
    progress.phase(STEPS[2])
    with messages.silent():
        engine.patch(model)
    progress.advance()
    progress.phase(STEPS[3])
    prefill, token = _speed(model, ids)
    progress.advance()
    worst = seen.worst(1)
    changes = planned.changes
    return {
        "overflows": not seen.finite,
        "culprit": str(seen.culprit) if seen.culprit else None,
        "float16_error": None if not seen.finite else seen.error,
        "headroom_bits": worst[0].headroom if worst else None,
        "headroom_at": worst[0].module if worst else None,
        "tokens": len(ids),
        "float32_bytes": sum(4 * math.prod(change.shape) for change in changes),
        "bytes_before": planned.bytes_before,
        "bytes_after": planned.bytes_after,
        "bytes_packed": packed.bytes_after,
        "dtypes": sorted({str(change.dtype).removeprefix("torch.") for change in changes}),
        "in_float32": planned.in_float32(),
        "largest_rounding": max((c.rounding.max_error for c in changes if c.in_float16), default=0.0),
        "to_zero": sum(c.rounding.flushed for c in changes if c.in_float16),
        "kernels": kernels.describe(),
        "prompt_tokens_per_second": len(ids) / prefill,
        "seconds_per_token": token,
        "class": type(model).__name__,
    }


def _speed(model: Any, ids: Any) -> tuple[float, float | None]:
    """Return the seconds of a prompt, and those of a token after it where the model generates any: medians."""
    import torch

    if hasattr(model, "set_kv_cache"):
        generate = _litgpt(model)
    elif model.can_generate():
        generate = _transformers(model)
    else:
        inputs = checkpoints.sample(model, ids)
        with torch.inference_mode():
            return median(_timed(lambda: _call(model, inputs)) for _ in range(1 + REPEATS)), None
    with torch.inference_mode():
        generate(ids, NEW_TOKENS)  # to warm up
        prompts, tokens = [], []
        for _ in range(REPEATS):
            first, whole = _timed(lambda: generate(ids, 1)), _timed(lambda: generate(ids, 1 + NEW_TOKENS))
            prompts.append(first)
            tokens.append((whole - first) / NEW_TOKENS)
    return median(prompts), median(tokens)


def _call(model: Any, inputs: Any) -> object:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _litgpt(model: Any) -> Callable[[Any, int], object]:
    from litgpt.generate.base import generate

    def run(ids: Any, count: int) -> object:
        model.clear_kv_cache()
        model.max_seq_length = len(ids) + NEW_TOKENS + 1
        model.set_kv_cache(1)
        return generate(model, ids, len(ids) + count, temperature=0.0)

    return run


def _transformers(model: Any) -> Callable[[Any, int], object]:
    import torch

    model.generation_config.eos_token_id = None  # min_new_tokens would look at all logits of every step

    def run(ids: Any, count: int) -> object:
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if model.config.is_encoder_decoder:
            options["decoder_start_token_id"] = 0  # any: what it says does not matter here
        return model.generate(ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options)

    return run


def _what(folder: Path, model: Any) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    library = "LitGPT" if hasattr(model, "set_kv_cache") else "Transformers"
    return f"{folder}: {type(model).__name__} of {library}, {count / 1e6:,.1f} million parameters"


def _next(folder: Path, found: dict[str, Any]) -> str:
    if not (folder / "model_config.yaml").is_file():
        return f"UPCAST=1 python program.py, or upcast.from_pretrained({found['class']}, folder) in it"
    if found["dtypes"] != ["float16"]:
        return f"python -m upcast convert {folder} (once: the copy is mapped and shared), or UPCAST=1 python program.py"
    return f"python -m upcast generate {folder} --prompt ..., or UPCAST=1 python program.py"


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    kept = ", ".join(f"{count} ({reason})" for reason, count in found["in_float32"].items()) or "none"
    zero = f"; {found['to_zero']:,} numbers become zero" if found["to_zero"] else ""
    moved = f"rounding moves a weight by up to {found['largest_rounding']:.1e}" if found["largest_rounding"] else ""
    rounding = (moved or "every weight as it was saved") + zero
    sizes = [console.megabytes(found[name]) for name in ("float32_bytes", "bytes_before", "bytes_after")]
    fewer = f" ({console.megabytes(found['bytes_packed'])} with storage='packed')" if _packs(found) else ""
    return [
        ("checkpoint", found["checkpoint"]),
        ("plain float16", _overflow(found)),
        ("with upcast", f"float32 math; {rounding}"),
        (
            "memory",
            f"{sizes[2]} with upcast{fewer}, {sizes[0]} in float32, {sizes[1]} as saved; tensors in float32: {kept}",
        ),
        (
            "speed here",
            f"{_decode(found)}prompts at {found['prompt_tokens_per_second']:,.0f} tokens/s, {found['kernels']} kernels",
        ),
        ("next", found["next"]),
    ]


def _packs(found: dict[str, Any]) -> bool:
    return bool(found["bytes_packed"] < found["bytes_after"])


def _decode(found: dict[str, Any]) -> str:
    return "" if found["seconds_per_token"] is None else f"{1e3 * found['seconds_per_token']:,.1f} ms per token, "


def _overflow(found: dict[str, Any]) -> str:
    if found["overflows"]:
        return f"OVERFLOWS on {found['tokens']} tokens of text, first in {found['culprit'] or 'its inputs'}"
    return (
        f"finite on {found['tokens']} tokens of text, error {found['float16_error']:.1e}; least headroom "
        f"{found['headroom_bits']:+.1f} bits, in {found['headroom_at'] or 'the model'}"
    )

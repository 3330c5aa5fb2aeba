"""Transformers' ``generate``, greedy: time per token of the patched model beside float32's, in interleaved rounds.

python -m benchmarks.suites.generate                            SmolLM2-135M-Instruct, real weights
python -m benchmarks.suites.generate --model Mixtral-shaped     a mixture of experts of 3 GB, random weights
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import limits, machine
from benchmarks.harness.subject import write_random_checkpoint
from benchmarks.harness.variants import weight_bytes
from benchmarks.models import mixtures, smollm2
from benchmarks.models.smollm2_transformers import prepare_transformers
from benchmarks.models.transformers_checkpoint import write_transformers

PROMPT = list(range(100, 164))
NEW_TOKENS = 64


def decode(model: Any) -> tuple[float, float, list[int]]:
    """Return (seconds of the prompt, seconds per token after it, the tokens) of one greedy generation."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model.generation_config.eos_token_id = None  # min_new_tokens would look at all logits of every step
    stamps: list[float] = [time.perf_counter()]
    handle = model.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    text = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[0].tolist()
    handle.remove()
    return stamps[1] - stamps[0], statistics.median(b - a for a, b in itertools.pairwise(stamps[1:])), text


def compare(folder: Path, rounds: int, eager: bool) -> None:
    """Decode with each variant in turns, and print one line for each; the first one is the baseline."""
    from transformers import AutoModelForCausalLM

    import upcast

    load = AutoModelForCausalLM.from_pretrained
    models = {"float32, eager": load(folder, dtype=torch.float32, attn_implementation="eager")} if eager else {}
    models["float32, sdpa"] = load(folder, dtype=torch.float32)
    models["upcast"] = upcast.from_pretrained(AutoModelForCausalLM, folder)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    texts, memory, rates = {}, limits.Memory(), []
    for _ in range(rounds):
        rates.append(memory.rate())
        for name, model in models.items():
            *seconds, texts[name] = decode(model)
            found[name].append((seconds[0], seconds[1]))
    print(f"{machine.cpu_model()}; memory was read at {statistics.median(rates) / 1e9:.1f} GB/s")
    first = next(iter(models))
    base = statistics.median(token for _, token in found[first])
    for name, model in models.items():
        prefill, token = (statistics.median(values) for values in zip(*found[name], strict=True))
        megabytes = weight_bytes(model) / 1e6
        same = "same text" if texts[name] == texts[first] else "other text"
        print(
            f"{name:16} {token * 1e3:6.1f} ms/token ({base / token:.2f}x)  prompt of {len(PROMPT)} "
            f"{prefill * 1e3:7.1f} ms  {megabytes:7.1f} MB  {same}"
        )


def main() -> None:
    """Print one line per variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(smollm2.MODEL, *mixtures.NAMES), default=smollm2.MODEL)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model == smollm2.MODEL:
        compare(prepare_transformers(), arguments.rounds, eager=True)
        return
    with tempfile.TemporaryDirectory(prefix="upcast-benchmark-") as scratch:
        source = write_random_checkpoint(mixtures.config_of(arguments.model), Path(scratch), torch.bfloat16)
        compare(write_transformers(source, Path(scratch) / "transformers"), arguments.rounds, eager=False)


if __name__ == "__main__":
    main()

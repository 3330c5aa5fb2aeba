"""SmolLM2-135M-Instruct as a Transformers checkpoint folder, made out of the LitGPT one.

``python -m benchmarks.models.smollm2_transformers`` compares ``generate`` of the patched model with float32 eager:
decode time per token in interleaved rounds, weight bytes, and the text.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from litgpt import Config
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from safetensors.torch import save_file

from benchmarks.models.smollm2 import MANIFEST, prepare

PROMPT = list(range(100, 164))
NEW_TOKENS = 64


def prepare_transformers(folder: Path | None = None) -> Path:
    """Return a folder for ``AutoModelForCausalLM.from_pretrained``, written beside LitGPT's on first use (float16)."""
    source = prepare()
    folder = folder or source.with_name(f"{source.name}-transformers")
    made_of = json.loads((source / MANIFEST).read_text())["files"]["lit_model.pth"]["sha256"]
    note = folder / "made_of.txt"
    if (folder / "config.json").is_file() and note.is_file() and note.read_text() == made_of:
        return folder
    write_transformers(source, folder)
    note.write_text(made_of)  # last: it says that all is there
    return folder


def write_transformers(source: Path, folder: Path) -> Path:
    """Write LitGPT's checkpoint of a plain Llama in ``source`` as a float16 one of Transformers; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Config.from_file(source / "model_config.yaml")
    state: dict[str, torch.Tensor] = {}
    copy_weights_llama(settings, state, torch.load(source / "lit_model.pth", mmap=True), untie_weights=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    (folder / "config.json").write_text(json.dumps(_config(settings), indent=1))
    return folder


def _config(settings: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": settings.n_embd,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.n_layer,
        "num_attention_heads": settings.n_head,
        "num_key_value_heads": settings.n_query_groups,
        "head_dim": settings.head_size,
        "vocab_size": settings.padded_vocab_size,
        "max_position_embeddings": settings.block_size,
        "rms_norm_eps": settings.norm_eps,
        "rope_theta": float(settings.rope_base),
        "tie_word_embeddings": True,
        "dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def decode(model: Any) -> tuple[float, list[int]]:
    """Return (seconds per token after the prompt, the tokens) of one greedy generation."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.generation_config.eos_token_id = None  # min_new_tokens would look at all logits of every step
    stamps: list[float] = []
    handle = model.register_forward_hook(lambda *_: stamps.append(time.perf_counter()))
    text = model.generate(ids, max_new_tokens=NEW_TOKENS, **options)[0].tolist()
    handle.remove()
    return statistics.median(b - a for a, b in itertools.pairwise(stamps)), text


def main() -> None:
    """Print one line per variant, or only make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--prepare", action="store_true", help="only make the folder, and print where it is")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = prepare_transformers()
    if arguments.prepare:
        print(folder)
        return
    compare(folder, arguments.rounds)


def compare(folder: Path, rounds: int) -> None:
    """Decode with each variant in turns, and print one line for each."""
    from transformers import AutoModelForCausalLM

    import upcast

    models = {
        "float32, eager": AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ),
        "float32, sdpa": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "upcast": upcast.from_pretrained(AutoModelForCausalLM, folder),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    texts = {}
    for _ in range(rounds):
        for name, model in models.items():
            seconds, texts[name] = decode(model)
            times[name].append(seconds)
    base = statistics.median(times["float32, eager"])
    for name, model in models.items():
        seconds = statistics.median(times[name])
        megabytes = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values()) / 1e6
        same = "same text" if texts[name] == texts["float32, eager"] else "other text"
        print(f"{name:16} {seconds * 1e3:6.1f} ms/token ({base / seconds:.2f}x)  {megabytes:6.1f} MB  {same}")


if __name__ == "__main__":
    main()

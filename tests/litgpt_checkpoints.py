"""Small LitGPT checkpoint folders for the tests: seeded random weights and a tokenizer of bytes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 128, "padded_vocab_size": 320, "vocab_size": 320}


def small_config(name: str, **changes: Any) -> Any:
    """Return LitGPT's config ``name`` with its structure kept and its sizes shrunk."""
    from litgpt import Config

    config = Config.from_name(name)
    groups = 4 if config.n_query_groups in (None, config.n_head) else max(1, 4 * config.n_query_groups // config.n_head)
    sizes = {**SMALL, "n_query_groups": groups, "head_size": None, "intermediate_size": None}
    if config.intermediate_size != 4 * config.n_embd or config.mlp_class_name == "LLaMAMLP":
        sizes["intermediate_size"] = 96
    for listed in ("sliding_window_indices", "rope_indices"):
        if getattr(config, listed, None) is not None:
            sizes[listed] = getattr(config, listed)[: changes.get("n_layer", SMALL["n_layer"])]
    if config.n_expert:
        sizes["n_expert"] = 8
    if config.sliding_window_size:
        sizes["sliding_window_size"] = 16
    return Config.from_name(name, **{**sizes, **changes})


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer with an end-of-text token, as LitGPT's Tokenizer reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))


def write_checkpoint(folder: Path, config: Any, dtype: torch.dtype = torch.float16, spoil: Any = None) -> Path:
    """Write model_config.yaml, lit_model.pth and a tokenizer; ``spoil(state_dict)`` may change the weights."""
    import yaml
    from litgpt import GPT

    torch.manual_seed(0)
    state = {name: tensor.to(dtype) for name, tensor in GPT(config).state_dict().items()}
    if spoil is not None:
        spoil(state)
    folder.mkdir(parents=True)
    torch.save(state, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.dump(asdict(config)))
    write_tokenizer(folder)
    return folder

"""llama.cpp as a peer: the same weights in an F16 GGUF file, driven token by token through its C API.

An optional peer (`--peers`): `pip install llama-cpp-python` compiles llama.cpp for this machine, which takes minutes.
"""

import ctypes
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from litgpt.config import Config
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import stress
from benchmarks.harness.job import BATCHED, Job, prompts_of, spans
from benchmarks.models.architecture import LLAMA, MIXTRAL, MIXTURES, QWEN3_MOE, architecture
from benchmarks.peers import base as peer
from upcast.core import pages

PACKAGE = "llama-cpp-python"
CONTEXT, BATCH = 2048, 512  # positions in all but for long prompts, and at once

BLOCK_NAMES = {
    "norm_1.weight": "attn_norm.weight",
    "attn.proj.weight": "attn_output.weight",
    "norm_2.weight": "ffn_norm.weight",
}
MLP_NAMES = {
    "mlp.fc_1.weight": "ffn_gate.weight",
    "mlp.fc_2.weight": "ffn_up.weight",
    "mlp.proj.weight": "ffn_down.weight",
}
MIXTURE_NAMES = {"mlp.gate.weight": "ffn_gate_inp.weight"}
EXPERT_NAMES = {"fc_1": "ffn_gate_exps.weight", "fc_2": "ffn_up_exps.weight", "proj": "ffn_down_exps.weight"}
HEAD_NORMS = {"attn.norm_q.weight": "attn_q_norm.weight", "attn.norm_k.weight": "attn_k_norm.weight"}
# What llama.cpp calls an architecture, and whether rows of queries and keys that turn together are side by side there.
FAMILIES = {LLAMA: ("llama", True), MIXTRAL: ("llama", True), QWEN3_MOE: ("qwen3moe", False)}


def why_not(config: Config) -> str | None:
    """Return why llama.cpp cannot be measured on this model, or None."""
    return peer.missing("llama_cpp", PACKAGE) or peer.not_written(config, LLAMA, *MIXTURES)


def write_gguf(state: Mapping[str, Tensor], config: Config, eps: float, path: Path) -> None:
    """Write LitGPT's `state` as a GGUF file of F16 weights (vectors in F32), without a vocabulary."""
    kind = architecture(config)
    assert kind is not None, "why_not told"
    writer = gguf.GGUFWriter(path, FAMILIES[kind][0])
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_query_groups)
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_dimension_count(config.rope_n_elem)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    if kind in MIXTURES:
        writer.add_expert_count(config.n_expert)
        writer.add_expert_used_count(config.n_expert_per_token)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size or config.intermediate_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, array in _tensors(state, config):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pages.advise(path)  # as LitGPT's checkpoint was


def _tensors(state: Mapping[str, Tensor], config: Config) -> list[tuple[str, NDArray[Any]]]:
    embedding, head = state["transformer.wte.weight"], state["lm_head.weight"]
    found = [("token_embd.weight", embedding), ("output_norm.weight", state["transformer.ln_f.weight"])]
    if not torch.equal(embedding, head):
        found.append(("output.weight", head))
    for block in range(config.n_layer):
        found += _block_tensors(state, config, f"transformer.h.{block}.", f"blk.{block}.")
    return [(name, _stored(name, tensor)) for name, tensor in found]


def _block_tensors(state: Mapping[str, Tensor], config: Config, ours: str, theirs: str) -> list[tuple[str, Tensor]]:
    kind = architecture(config)
    mixture, paired = kind in MIXTURES, FAMILIES[str(kind)][1]
    names = BLOCK_NAMES | (MIXTURE_NAMES if mixture else MLP_NAMES) | (HEAD_NORMS if config.norm_qk else {})
    found = [(theirs + name, state[ours + source]) for source, name in names.items()]
    for source, name in EXPERT_NAMES.items() if mixture else ():
        parts = [state[f"{ours}mlp.experts.{i}.{source}.weight"] for i in range(config.n_expert)]
        found.append((theirs + name, torch.stack(parts)))
    widths = [size * config.head_size for size in (config.n_head, config.n_query_groups, config.n_query_groups)]
    query, key, value = state[ours + "attn.qkv.weight"].split(widths)
    found.append((theirs + "attn_q.weight", rope_pairs(query, config.n_head) if paired else query))
    found.append((theirs + "attn_k.weight", rope_pairs(key, config.n_query_groups) if paired else key))
    found.append((theirs + "attn_v.weight", value))
    return found


def rope_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return a query or key weight (heads * head_size, n_embd) in llama.cpp's order: rows that turn together meet."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _stored(name: str, tensor: Tensor) -> NDArray[Any]:
    narrow = tensor.dim() > 1 and not name.endswith("ffn_gate_inp.weight")  # llama.cpp takes routers in float32
    return np.ascontiguousarray(tensor.to(torch.float16 if narrow else torch.float32).numpy())


class Model:
    """A model and its context; positions are counted from `reset`."""

    def __init__(
        self, path: Path, threads: int, kv_cache: str = "float16", context: int = CONTEXT, sequences: int = 1
    ) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._log = self.api.llama_log_callback(lambda level, text, data: None)  # kept alive: llama.cpp calls it
        self.api.llama_log_set(self._log, ctypes.c_void_p())
        settings = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), settings)
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, max(BATCH, sequences * BATCHED), BATCH
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        if kv_cache == "float32":
            options.type_k = options.type_v = self.api.GGML_TYPE_F32
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.positions = int(self.api.llama_n_ctx(self.context))
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.reset()

    def reset(self) -> None:
        """Forget all positions."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self.position = 0

    def run(self, tokens: list[int], all_logits: bool = False) -> Tensor:
        """Return the logits of the last position (1, vocabulary), or of all; float32, valid until the next call."""
        while len(tokens) > BATCH and not all_logits:
            self.run(tokens[:BATCH])
            tokens = tokens[BATCH:]
        return self.run_together([tokens], all_logits)

    def run_together(self, sequences: list[list[int]], all_logits: bool = False) -> Tensor:
        """Return what `run` does for as many tokens of each sequence (sequences, vocabulary)."""
        count = len(sequences[0])
        rows = [(i, token, number) for number, tokens in enumerate(sequences) for i, token in enumerate(tokens)]
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for row, (i, token, number) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, self.position + i, 1
            batch.seq_id[row][0] = number
            batch.logits[row] = all_logits or i == count - 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.api.llama_batch_free(batch)
        self.position += count
        pointer = self.api.llama_get_logits(self.context)
        shape = (len(rows) if all_logits else len(sequences), self.vocabulary)
        array: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=shape)
        return torch.from_numpy(array)

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


class LlamaCppWorker(peer.PeerWorker):
    """What a variant's worker does (worker.py), for llama.cpp."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, Model)

    def written(self, scale: int) -> Path:
        config = Config.from_checkpoint(self.job.checkpoint)
        path = self.job.scratch / f"llama-{scale}.gguf"
        write_gguf(stress.stress(self.state(), scale), config, config.norm_eps * scale**2, path)
        return path

    def context(self, length: int, new_tokens: int) -> tuple[float, float]:
        if length + new_tokens > self.model.positions:
            self.model.close()
            self.model = Model(self.job.scratch / "llama-1.gguf", self.threads(), context=length + new_tokens)
        return super().context(length, new_tokens)

    def batch(self, size: int, new_tokens: int) -> tuple[float, float]:
        """Return the seconds of ``size`` prompts at once, and per step after them."""
        prompts = prompts_of(self.job, size)
        model = Model(self.job.scratch / "llama-1.gguf", self.threads(), context=256 * size, sequences=size)
        following, times = [list(prompt) for prompt in prompts], [time.perf_counter()]
        for _ in range(new_tokens):
            following = [[int(token)] for token in model.run_together(following).argmax(-1)]
            times.append(time.perf_counter())
        model.close()
        return spans(times)

    def weight_bytes(self, path: Path) -> int:
        return int(self.model.api.llama_model_size(self.model.model))

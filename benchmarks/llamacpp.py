"""llama.cpp as a peer: the same weights in an F16 GGUF file, driven token by token through its C API.

An optional peer (`--peers`): `pip install llama-cpp-python` compiles llama.cpp for this machine, which takes minutes.
"""

import ctypes
import gc
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

from benchmarks import memory, quality, stress
from benchmarks.worker import STRESS_TOKENS, Job, Loading, Sample, StressOutcome, next_tokens, stress_outcome

PACKAGE = "llama-cpp-python"
CONTEXT, BATCH = 2048, 512  # positions in all, and at once: more than any measurement takes

BLOCK_NAMES = {
    "norm_1.weight": "attn_norm.weight",
    "attn.proj.weight": "attn_output.weight",
    "norm_2.weight": "ffn_norm.weight",
    "mlp.fc_1.weight": "ffn_gate.weight",
    "mlp.fc_2.weight": "ffn_up.weight",
    "mlp.proj.weight": "ffn_down.weight",
}


def why_not(config: Config) -> str | None:
    """Return why llama.cpp cannot be measured on this model, or None."""
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return f"{PACKAGE} is not installed; `pip install {PACKAGE}` compiles it for this machine"
    llama = (config.norm_class_name, config.mlp_class_name, config.bias) == ("RMSNorm", "LLaMAMLP", False)
    plain = config.rotary_percentage == 1.0 and config.rope_adjustments is None and not config.norm_qk
    if not (llama and plain and not config.parallel_residual):
        return f"{config.name} is not of the plain Llama architecture, the one that is written as GGUF here"
    return None


def write_gguf(state: Mapping[str, Tensor], config: Config, eps: float, path: Path) -> None:
    """Write LitGPT's `state` as a GGUF file of F16 weights (vectors in F32), without a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, array in _tensors(state, config):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(state: Mapping[str, Tensor], config: Config) -> list[tuple[str, NDArray[Any]]]:
    embedding, head = state["transformer.wte.weight"], state["lm_head.weight"]
    found = [("token_embd.weight", embedding), ("output_norm.weight", state["transformer.ln_f.weight"])]
    if not torch.equal(embedding, head):
        found.append(("output.weight", head))
    widths = [size * config.head_size for size in (config.n_head, config.n_query_groups, config.n_query_groups)]
    for block in range(config.n_layer):
        ours, theirs = f"transformer.h.{block}.", f"blk.{block}."
        found += [(theirs + name, state[ours + source]) for source, name in BLOCK_NAMES.items()]
        query, key, value = state[ours + "attn.qkv.weight"].split(widths)
        found.append((theirs + "attn_q.weight", rope_pairs(query, config.n_head)))
        found.append((theirs + "attn_k.weight", rope_pairs(key, config.n_query_groups)))
        found.append((theirs + "attn_v.weight", value))
    return [(name, _stored(tensor)) for name, tensor in found]


def rope_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return a query or key weight (heads * head_size, n_embd) in llama.cpp's order: rows that turn together meet."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _stored(tensor: Tensor) -> NDArray[Any]:
    dtype = torch.float16 if tensor.dim() > 1 else torch.float32
    return np.ascontiguousarray(tensor.to(dtype).numpy())


class Model:
    """A model and its context; positions are counted from `reset`."""

    def __init__(self, path: Path, threads: int, kv_cache: str = "float16") -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self._log = self.api.llama_log_callback(lambda level, text, data: None)  # kept alive: llama.cpp calls it
        self.api.llama_log_set(self._log, ctypes.c_void_p())
        settings = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), settings)
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        if kv_cache == "float32":
            options.type_k = options.type_v = self.api.GGML_TYPE_F32
        self.context = self.api.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.reset()

    def reset(self) -> None:
        """Forget all positions."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self.position = 0

    def run(self, tokens: list[int], all_logits: bool = False) -> Tensor:
        """Return the logits of the last position (1, vocabulary), or of all; float32, valid until the next call."""
        count = len(tokens)
        batch = self.api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == count - 1
        if self.api.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.api.llama_batch_free(batch)
        self.position += count
        rows = count if all_logits else 1
        pointer = self.api.llama_get_logits(self.context)
        array: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary))
        return torch.from_numpy(array)

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


class LlamaCppWorker:
    """What a variant's worker does (worker.py), for llama.cpp."""

    def __init__(self, job: Job) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self.job = job
        self.imported_bytes = memory.resident_bytes() if memory.supported() else None

    def threads(self) -> int:
        return torch.get_num_threads()

    def _written(self, scale: int) -> Path:
        """Write the model, its residual stream scaled as in the stress test, into a file."""
        config = Config.from_checkpoint(self.job.checkpoint)
        state = torch.load(self.job.checkpoint / "lit_model.pth", mmap=True, weights_only=True)
        path = self.job.scratch / f"llama-{scale}.gguf"
        write_gguf(stress.stress(state.get("model", state), scale), config, config.norm_eps * scale**2, path)
        return path

    def load(self) -> Loading:
        path = self._written(1)
        gc.collect()
        if memory.supported():
            self.imported_bytes = memory.resident_bytes()
            memory.reset_peak()
        self.model = Model(path, self.threads())
        peak = self._above_imports(memory.peak_bytes()) if memory.supported() else None
        return Loading(int(self.model.api.llama_model_size(self.model.model)), peak)

    def _above_imports(self, level: int) -> int | None:
        return level - self.imported_bytes if self.imported_bytes is not None else None

    def warm_up(self) -> int | None:
        self.sample(new_tokens=2)
        return self._above_imports(memory.resident_bytes()) if memory.supported() else None

    def sample(self, new_tokens: int) -> Sample:
        _, prefill = self._generate(list(self.job.prompt), 1)
        answer, times = self._generate(list(self.job.chat), new_tokens)
        decode = (times[-1] - times[1]) / (new_tokens - 1)
        return Sample(prefill[1] - prefill[0], decode, times[1] - times[0], tuple(answer))

    def _generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
        self.model.reset()
        tokens, times = list[int](), [time.perf_counter()]
        following = prompt
        for _ in range(new_tokens):
            following = [int(self.model.run(following)[0].argmax())]
            times.append(time.perf_counter())
            tokens += following
        return tokens, times

    def quality(self) -> quality.Quality:
        windows = torch.tensor(self.job.windows)
        parts = []
        for window in windows.tolist():
            self.model.reset()
            parts.append(self.model.run(window, all_logits=True).clone())
        return quality.assess(torch.cat(parts), self._reference(), next_tokens(windows))

    def stress(self, scale: int) -> StressOutcome:
        model, tokens = Model(self._written(scale), self.threads()), list(self.job.windows[0][:STRESS_TOKENS])
        logits = model.run(tokens, all_logits=True).clone()
        model.close()
        return stress_outcome(scale, logits, self._reference()[: len(tokens)])

    def _reference(self) -> Tensor:
        reference: Tensor = torch.load(self.job.scratch / "reference.pt", mmap=True, weights_only=True)
        return reference

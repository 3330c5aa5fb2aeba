"""OpenVINO as a peer: the same weights in float16, traced from a plain decoder, its KV cache a state of the model.

An optional peer (`--peers`): `pip install openvino`. Nothing is downloaded: the model is built here.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litgpt.config import Config
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from benchmarks.harness import stress
from benchmarks.harness.job import Job
from benchmarks.models.architecture import LLAMA
from benchmarks.peers import base as peer

PACKAGE = "openvino"
LENGTH = 2048  # positions of the tables of angles


def why_not(config: Config) -> str | None:
    """Return why OpenVINO cannot be measured on this model, or None."""
    return peer.missing(PACKAGE, PACKAGE) or peer.not_written(config, LLAMA)


class Decoder(nn.Module):
    """A plain Llama: float32 in and out, keys and values of earlier positions as arguments and results."""

    cos: Tensor
    sin: Tensor

    def __init__(self, state: Mapping[str, Tensor], config: Config, eps: float) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.names: dict[str, str] = {}
        for name, tensor in state.items():
            self.names[name] = name.replace(".", "_")
            self.register_buffer(self.names[name], tensor.float())
        frequencies = config.rope_base ** -(torch.arange(0, config.rope_n_elem, 2) / config.rope_n_elem)
        angles = torch.outer(torch.arange(LENGTH), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def weight(self, name: str) -> Tensor:
        found: Tensor = getattr(self, self.names[f"{name}.weight"])
        return found

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """ids (1, T), positions (T,), rows (R,): which positions' logits (R, vocabulary) are wanted."""
        config = self.config
        x = torch.nn.functional.embedding(ids, self.weight("transformer.wte"))
        known = past[0].shape[2] + ids.shape[1]
        seen = torch.arange(known).unsqueeze(0) <= positions.unsqueeze(1)
        cos, sin = self.cos[positions], self.sin[positions]
        present: list[Tensor] = []
        for block in range(config.n_layer):
            name = f"transformer.h.{block}"
            normed = self._norm(x, f"{name}.norm_1")
            q, k, v = self._heads(linear(normed, self.weight(f"{name}.attn.qkv")))
            k = torch.cat((past[2 * block], _turned(k, cos, sin)), dim=2)
            v = torch.cat((past[2 * block + 1], v), dim=2)
            present += [k, v]
            group = config.n_head // config.n_query_groups
            keys, values = (each.repeat_interleave(group, dim=1) for each in (k, v))
            y = scaled_dot_product_attention(_turned(q, cos, sin), keys, values, attn_mask=seen)
            x = x + linear(y.transpose(1, 2).flatten(2), self.weight(f"{name}.attn.proj"))
            normed = self._norm(x, f"{name}.norm_2")
            gate, up = (linear(normed, self.weight(f"{name}.mlp.{each}")) for each in ("fc_1", "fc_2"))
            x = x + linear(silu(gate) * up, self.weight(f"{name}.mlp.proj"))
        x = self._norm(x.index_select(1, rows), "transformer.ln_f")
        return (linear(x, self.weight("lm_head"))[0], *present)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weight(name), self.eps)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        sizes = [heads * self.config.head_size for heads in self._counts()]
        parts = qkv.split(sizes, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.config.head_size)).transpose(1, 2) for part in parts)

    def _counts(self) -> tuple[int, int, int]:
        return (self.config.n_head, self.config.n_query_groups, self.config.n_query_groups)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (1, H, T, D) by angles (T, D), halves with halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def write(state: Mapping[str, Tensor], config: Config, eps: float, path: Path) -> None:
    """Write LitGPT's `state` as an OpenVINO model with float16 weights and a KV cache that it keeps itself."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    decoder = Decoder(state, config, eps).eval()
    past = [torch.zeros(1, config.n_query_groups, 2, config.head_size) for _ in range(2 * config.n_layer)]
    example = (torch.zeros(1, 3, dtype=torch.int64), torch.arange(2, 5), torch.tensor([2]), *past)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenVINO traces with torch.jit, which torch deprecates
        model = openvino.convert_model(decoder, example_input=example)
    for index, name in enumerate(("ids", "positions", "rows")):
        model.inputs[index].get_tensor().set_names({name})
    for entry, shape in zip(model.inputs[:3], ([1, -1], [-1], [-1]), strict=True):
        entry.get_node().set_partial_shape(openvino.PartialShape(shape))
    pairs = {}
    for index, (entry, result) in enumerate(zip(model.inputs[3:], model.outputs[1:], strict=True)):
        entry.get_tensor().set_names({f"past.{index}"})
        result.get_tensor().set_names({f"present.{index}"})
        entry.get_node().set_partial_shape(openvino.PartialShape([1, config.n_query_groups, -1, config.head_size]))
        pairs[f"past.{index}"] = f"present.{index}"
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    openvino.save_model(model, path, compress_to_fp16=True)


class Model:
    """A compiled model; positions are counted from `reset`."""

    def __init__(self, path: Path, threads: int, kv_cache: str = "float16") -> None:
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f16" if kv_cache == "float16" else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self.request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
        self.position = 0

    def reset(self) -> None:
        """Forget all positions."""
        self.request.reset_state()
        self.position = 0

    def run(self, tokens: list[int], all_logits: bool = False) -> Tensor:
        """Return the logits of the last position (1, vocabulary), or of all; float32, valid until the next call."""
        count = len(tokens)
        positions = np.arange(self.position, self.position + count)
        rows = np.arange(count) if all_logits else np.array([count - 1])
        found: Any = self.request.infer({"ids": np.array([tokens]), "positions": positions, "rows": rows})
        self.position += count
        return torch.from_numpy(found[0])

    def close(self) -> None:
        del self.request


class OpenVinoWorker(peer.PeerWorker):
    """What a variant's worker does (worker.py), for OpenVINO."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, Model)

    def written(self, scale: int) -> Path:
        config = Config.from_checkpoint(self.job.checkpoint)
        path = self.job.scratch / f"openvino-{scale}.xml"
        write(stress.stress(self.state(), scale), config, config.norm_eps * scale**2, path)
        return path

    def weight_bytes(self, path: Path) -> int:
        return path.with_suffix(".bin").stat().st_size

"""The ways to run one checkpoint on CPU: how each is loaded, and what its forward pass runs under.

Baselines load as LitGPT does (`LLM.distribute`): build `GPT(config)` in the precision asked for, then copy
the checkpoint into it. `from_state` builds the same variant from a state dict, for the stress test.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import load_checkpoint

BASELINE = "float32"


@dataclass(frozen=True)
class Variant:
    """One way to run the model. `finish` turns a model whose weights are `dtype` into the variant."""

    name: str
    about: str
    dtype: torch.dtype
    precision: str  # Lightning Fabric's name of `dtype`
    finish: Callable[[GPT], GPT] = lambda model: model
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    load_with: Callable[[Path], GPT] | None = None  # where the variant brings a loader of its own

    def load(self, checkpoint: Path) -> GPT:
        """Return the model in eval mode, loaded from a LitGPT checkpoint folder."""
        if self.load_with is not None:
            return self.load_with(checkpoint)
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=self.precision)
        # LitGPT fills the weights with random numbers here, then overwrites them; memory is the same without.
        with fabric.init_module(empty_init=True):
            model = GPT(Config.from_checkpoint(checkpoint))
        load_checkpoint(fabric, model, checkpoint / "lit_model.pth")
        return self.finish(model.eval())

    def from_state(self, state: Mapping[str, torch.Tensor], config: Config) -> GPT:
        """Return the model in eval mode with the weights of `state`, converted to the variant's dtype."""
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict({name: tensor.to(self.dtype) for name, tensor in state.items()}, assign=True)
        model.cos, model.sin = model.rope_cache()
        return self.finish(model.eval())


def _quantize_dynamic(model: GPT) -> GPT:
    with warnings.catch_warnings():
        # PyTorch deprecates torch.ao.quantization; it is still its only float16-weight path on CPU.
        warnings.simplefilter("ignore", DeprecationWarning)
        quantize: Callable[..., GPT] = torch.ao.quantization.quantize_dynamic
        # In place: the default deep-copies the float32 model first, which would only inflate its peak.
        return quantize(model, {torch.nn.Linear}, dtype=torch.float16, inplace=True)


def _autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _upcast_load(checkpoint: Path, storage: str = "float16") -> GPT:
    import upcast

    return upcast.load_litgpt(checkpoint, storage=storage)


def _upcast_patch(model: GPT, storage: str = "float16") -> GPT:
    import upcast

    return upcast.patch(model, storage=storage)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(BASELINE, "float32 weights and math", torch.float32, "32-true"),
        Variant("float16", "float16 weights and math", torch.float16, "16-true"),
        Variant("bfloat16", "bfloat16 weights and math", torch.bfloat16, "bf16-true"),
        Variant(
            "autocast",
            "float32 weights, torch.autocast to bfloat16",
            torch.float32,
            "32-true",
            context=_autocast,
        ),
        Variant(
            "quantize_dynamic",
            "torch.ao quantize_dynamic(dtype=float16) on every Linear",
            torch.float32,
            "32-true",
            finish=_quantize_dynamic,
        ),
        Variant(
            "upcast",
            "float16 weights, float32 math",
            torch.float16,
            "16-true",
            finish=_upcast_patch,
            load_with=_upcast_load,
        ),
        Variant(
            "upcast-packed",
            "bfloat16's numbers in 12 bits, float32 math",
            torch.bfloat16,
            "bf16-true",
            finish=functools.partial(_upcast_patch, storage="packed"),
            load_with=functools.partial(_upcast_load, storage="packed"),
        ),
    )
}


LLAMA_CPP, OPENVINO = "llama.cpp", "OpenVINO"
# What runs the same weights outside of PyTorch, with --peers: the name and what it is.
PEERS = {
    LLAMA_CPP: "llama.cpp (llama-cpp-python), an F16 GGUF file of the same weights",
    OPENVINO: "OpenVINO, float16 weights of the same model, float32 math",
}


def about(name: str) -> str:
    """Return what the variant or peer of that name is."""
    return PEERS[name] if name in PEERS else VARIANTS[name].about


def weight_bytes(model: GPT) -> int:
    """Bytes of all weights at rest; storages that several names share count once.

    Packed weights of `quantize_dynamic` are opaque: they count two bytes per element, without their padding.
    """
    storages: dict[int, int] = {}
    packed = 0
    for parameter in model.parameters():
        storage = _storage(parameter)
        storages[storage.data_ptr()] = storage.nbytes()
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module._packed_params._weight_bias()
            packed += 2 * weight.numel() + (4 * bias.numel() if bias is not None else 0)
    return sum(storages.values()) + packed


def share_in_use(name: str, config: Config) -> float:
    """Return the share of what is called ``name``, a parameter or a module, that a token uses: experts are chosen."""
    return config.n_expert_per_token / config.n_expert if ".experts." in name else 1.0


def bytes_per_token(model: GPT) -> int:
    """Bytes of the weights that one decoded token reads: all but the embedding, of which it takes a row.

    A head that shares the embedding's memory reads it as a whole. Of experts, as many as a token chooses, all alike.
    """
    embedding = _storage(model.transformer.wte.weight)
    named = [*model.named_parameters(remove_duplicate=False)]
    shared = any(
        _storage(each).data_ptr() == embedding.data_ptr() for name, each in named if name != "transformer.wte.weight"
    )
    idle = {
        _storage(each).data_ptr(): (1 - share_in_use(name, model.config)) * _storage(each).nbytes()
        for name, each in named
    }
    return weight_bytes(model) - round(sum(idle.values())) - (0 if shared else embedding.nbytes())


def _products(module: torch.nn.Module) -> int:
    """Numbers of a matrix; modules of `quantize_dynamic` have no parameter to ask."""
    size: int = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
    return size


def prompt_operations(model: GPT, tokens: int) -> int:
    """Multiplications and additions of a prefill's products: every matrix for every token, the head for the last.

    Of experts, as many as each token chooses.
    """
    named = model.transformer.h.named_modules(prefix="h")
    layers = sum(_products(each) * share_in_use(name, model.config) for name, each in named)
    return 2 * (round(layers) * tokens + _products(model.lm_head))


def _storage(parameter: torch.Tensor) -> torch.UntypedStorage:
    inside = getattr(parameter, "blob", None)  # of a PackedWeight, or else a HalfWeight's float16 tensor
    return (getattr(parameter, "stored", parameter) if inside is None else inside).untyped_storage()

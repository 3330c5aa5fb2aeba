"""Probes: what upcast relies on in other libraries. Each failure names the library, its version and what is gone."""

import importlib
import inspect
from importlib.metadata import version
from typing import Any

import pytest

# library -> module -> names that must be there, and for functions the arguments that must be among theirs
RELIED_ON: dict[str, list[tuple[str, str, set[str]]]] = {
    "torch": [
        ("torch", "_C._nn._parse_to", set()),
        ("torch", "_C.DisableTorchFunctionSubclass", set()),
        ("torch", "Tensor._make_wrapper_subclass", set()),
        ("torch", "lstm", set()),
        ("torch", "gru", set()),
        ("torch", "rnn_tanh", set()),
        ("torch", "rnn_relu", set()),
        ("torch", "lstm_cell", set()),
        ("torch.nn", "Module._apply", {"fn", "recurse"}),
        ("torch.nn.functional", "multi_head_attention_forward", {"query", "in_proj_weight", "out_proj_weight"}),
        ("torch.nn.functional", "embedding_bag", {"input", "weight", "offsets", "padding_idx"}),
        ("torch.nn.functional", "scaled_dot_product_attention", set()),
        ("torch.nn.functional", "interpolate", {"input"}),
        ("torch._guards", "TracingContext.try_get", set()),
        ("torch._subclasses.fake_tensor", "FakeTensor", set()),
        ("torch._subclasses.meta_utils", "MetaTensorDescriber.describe_tensor", {"t"}),
        ("torch.compiler", "is_exporting", set()),
        ("torch.fx.experimental.proxy_tensor", "get_proxy_mode", set()),
    ],
    "litgpt": [
        ("litgpt.api", "LLM.load", {"model", "init", "tokenizer_dir", "access_token", "distribute"}),
        ("litgpt.api", "LLM.distribute", {"accelerator", "precision", "quantize", "generate_strategy"}),
        ("litgpt.model", "GPT.forward", {"idx", "input_pos", "input_pos_maxp1", "lm_head_chunk_size"}),
        ("litgpt.model", "CausalSelfAttention.forward", {"x", "cos", "sin", "mask", "input_pos"}),
        ("litgpt.model", "CausalSelfAttention.build_kv_cache", {"batch_size", "max_seq_length", "dtype"}),
        ("litgpt.model", "KVCache.forward", {"input_pos", "k", "v"}),
        ("litgpt.model", "MultiheadLatentAttention", set()),
        ("litgpt.generate.base", "next_token", set()),
        ("litgpt.generate.base", "batched_next_token", set()),
    ],
    "transformers": [
        ("transformers.modeling_utils", "PreTrainedModel.from_pretrained", {"pretrained_model_name_or_path"}),
        (
            "transformers.modeling_utils",
            "PreTrainedModel._load_pretrained_model",
            {"model", "state_dict", "checkpoint_files", "load_config"},
        ),
        ("transformers.modeling_utils", "load_state_dict", {"checkpoint_file", "map_location", "weights_only"}),
        ("transformers.core_model_loading", "_materialize_copy", {"tensor", "device", "dtype"}),
        ("transformers.cache_utils", "DynamicLayer.update", {"key_states", "value_states", "cache_kwargs"}),
        ("transformers.cache_utils", "DynamicSlidingWindowLayer.update", {"key_states", "value_states"}),
        ("transformers.cache_utils", "StaticLayer.lazy_initialization", {"key_states", "value_states"}),
        ("transformers.models.llama.modeling_llama", "LlamaRMSNorm.forward", {"hidden_states"}),
        ("transformers.models.llama.modeling_llama", "LlamaMLP.forward", {"x"}),
        (
            "transformers.models.llama.modeling_llama",
            "LlamaAttention.forward",
            {"hidden_states", "position_embeddings", "attention_mask", "past_key_values", "cache_position"},
        ),
        ("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb", {"q", "k", "cos", "sin"}),
    ],
    "diffusers": [
        ("diffusers.models.modeling_utils", "ModelMixin.from_pretrained", {"pretrained_model_name_or_path"}),
        ("diffusers.models.model_loading_utils", "load_model_dict_into_meta", {"model", "state_dict", "hf_quantizer"}),
    ],
}
PROBES = [(library, *probe) for library, probes in RELIED_ON.items() for probe in probes]


def missing(library: str, module: str, name: str, arguments: set[str]) -> str:
    """Return what is gone, in words that name the library and its version, or an empty string."""
    found: Any = importlib.import_module(module)
    here = f"{library} {version(library)}: {module}.{name}"
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return f"{here} is gone; upcast relies on it"
    if arguments and (lost := arguments - set(inspect.signature(found).parameters)):
        return f"{here} takes no {', '.join(sorted(lost))} any more; upcast relies on it"
    return ""


@pytest.mark.parametrize(("library", "module", "name", "arguments"), PROBES, ids=[f"{p[1]}.{p[2]}" for p in PROBES])
def test_what_upcast_relies_on_is_there(library: str, module: str, name: str, arguments: set[str]) -> None:
    pytest.importorskip(library)
    problem = missing(library, module, name, arguments)
    assert not problem, problem


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (("torch", "torch", "no_such_function", set()), "torch.no_such_function is gone"),
        (("torch", "torch.nn.functional", "embedding_bag", {"nothing"}), "takes no nothing any more"),
    ],
)
def test_a_probe_says_which_library_and_version(probe: tuple[Any, ...], said: str) -> None:
    problem = missing(*probe)
    assert said in problem
    assert f"torch {version('torch')}" in problem


def test_materialising_is_a_slice_and_then_to() -> None:
    """How Transformers turns an entry of a state dict into a tensor: `Arriving` imitates exactly this."""
    loading = pytest.importorskip("transformers.core_model_loading")
    calls: list[str] = []

    class Entry:
        def __getitem__(self, index: Any) -> "Entry":
            calls.append(f"[{index}]")
            return self

        def to(self, **kwargs: Any) -> str:
            calls.append(f"to({', '.join(kwargs)})")
            return "tensor"

    name = f"transformers {version('transformers')}: core_model_loading._materialize_copy"
    assert loading._materialize_copy(Entry(), "cpu", "float32") == "tensor", f"{name} does something else now"
    assert calls == ["[Ellipsis]", "to(device, dtype)"], f"{name} does something else now"

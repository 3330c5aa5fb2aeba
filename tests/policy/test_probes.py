"""Probes: what upcast relies on in other libraries. Each failure names the library, its version and what is gone."""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch

from upcast.integrations.transformers.load import _MERGING

LOADING = ("chat.base", "generate.base", "generate.full", "generate.speculative_decoding")
FINETUNING = ("lora", "adapter", "adapter_v2")

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
        ("litgpt.model", "RMSNorm.forward", {"x"}),
        ("litgpt.model", "LLaMAMLP.forward", {"x"}),
        ("litgpt.model", "GemmaMLP.forward", {"x"}),
        ("litgpt.model", "GptNeoxMLP.forward", {"x"}),
        ("litgpt.model", "LLaMAMoE.forward", {"x"}),
        ("litgpt.model", "GPT.set_kv_cache", {"batch_size", "max_seq_length", "device", "dtype"}),
        ("litgpt.model", "GPT.clear_kv_cache", set()),
        ("litgpt.generate.base", "next_token", {"model"}),
        ("litgpt.generate.base", "batched_next_token", {"model"}),
        ("litgpt.generate.base", "generate", {"model", "prompt", "max_returned_tokens"}),
        *((f"litgpt.{script}", "load_checkpoint", {"fabric", "model", "checkpoint_path"}) for script in LOADING),
        *((f"litgpt.generate.{adapter}", "lazy_load", set()) for adapter in ("adapter", "adapter_v2")),
        *((f"litgpt.generate.{adapter}", "GPT", set()) for adapter in ("adapter", "adapter_v2")),
        *((f"litgpt.generate.{split}", "main", set()) for split in ("sequentially", "tp")),
        *((f"litgpt.finetune.{kind}", "get_default_supported_precision", set()) for kind in FINETUNING),
        *((f"litgpt.finetune.{kind}", "instantiate_torch_optimizer", {"optimizer"}) for kind in FINETUNING),
        ("litgpt.utils", "check_file_size_on_cpu_and_warn", {"checkpoint_path", "device"}),
        ("litgpt.prompts", "load_prompt_style", {"checkpoint_dir"}),
    ],
    "lightning": [
        ("lightning.fabric.strategies", "SingleDeviceStrategy.precision", set()),
        ("lightning.fabric.plugins.precision", "Precision.convert_module", {"module"}),
        ("lightning.fabric.plugins.precision", "HalfPrecision", set()),
        ("lightning.fabric.plugins.precision", "MixedPrecision", set()),
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
        (
            "transformers.core_model_loading",
            "rename_source_key",
            {"source_key", "weight_renamings", "weight_converters"},
        ),
        ("transformers.core_model_loading", "WeightRenaming", set()),
        ("transformers.core_model_loading", "WeightConverter", {"operations"}),
        *(("transformers.core_model_loading", name, set()) for name in sorted(_MERGING)),
        ("transformers.modeling_utils", "LoadStateDictConfig", {"weight_mapping", "weights_only", "device_map"}),
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
        ("transformers.models.llama.modeling_llama", "rotate_half", {"x"}),
        (
            "transformers.models.llama.modeling_llama",
            "LlamaDecoderLayer.forward",
            {"hidden_states", "attention_mask", "past_key_values", "position_embeddings"},
        ),
        ("transformers.models.mistral.modeling_mistral", "MistralAttention.forward", {"past_key_values"}),
        ("transformers.models.qwen2.modeling_qwen2", "Qwen2Attention.forward", {"past_key_values"}),
        ("transformers.models.qwen3.modeling_qwen3", "Qwen3Attention.forward", {"past_key_values"}),
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


# --- attributes, of tiny instances ------------------------------------------------------------------------------------

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "block_size": 16, "intermediate_size": 48}


def litgpt_model(name: str, **sizes: Any) -> Any:
    from litgpt import GPT

    model = GPT.from_name(name, **{**SIZES, **sizes})
    model.set_kv_cache(batch_size=1)
    return model


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def used_cache() -> Any:
    from transformers import DynamicCache

    model = llama()
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    return cache


def fabric() -> Any:
    import lightning

    return lightning.Fabric(accelerator="cpu", devices=1)


LITGPT = """transformer.wte transformer.h transformer.ln_f lm_head mask_cache max_seq_length cos sin
    config.n_embd config.n_head config.n_query_groups config.head_size config.rope_n_elem config.rope_indices
    config.rope_interleave config.norm_qk config.norm_qk_type config.parallel_residual config.shared_attention_norm
    config.scale_embeddings config.sliding_window_size config.attention_logit_softcapping
    config.attention_scores_scalar config.final_logit_softcapping config.gelu_approximate"""
BLOCK = """norm_1 norm_2 post_attention_norm post_mlp_norm config attn.qkv attn.proj attn.norm_q attn.norm_k attn.mscale
    attn.block_idx attn.apply_sliding_window_attention attn.kv_cache.k attn.kv_cache.v attn.build_kv_cache"""
LLAMA = "embed_tokens norm layers.0.self_attn layers.0.input_layernorm.variance_epsilon layers.0.mlp.act_fn"
LAYER = """input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj self_attn.q_proj
    self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.scaling self_attn.head_dim self_attn.layer_idx
    self_attn.num_key_value_groups self_attn.attention_dropout self_attn.is_causal
    self_attn.config._attn_implementation"""
CACHE = "layers layer_class_to_replicate offloading"
CACHE_LAYER = "keys values is_initialized dtype device get_seq_length update"

# library -> instance, names of its attributes
ATTRIBUTES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "GPT": ("litgpt", lambda: litgpt_model("pythia-14m"), LITGPT),
    "Block": ("litgpt", lambda: litgpt_model("pythia-14m").transformer.h[0], BLOCK),
    "GptNeoxMLP": ("litgpt", lambda: litgpt_model("pythia-14m").transformer.h[0].mlp, "fc proj config"),
    "LLaMAMLP": (
        "litgpt",
        lambda: litgpt_model("Llama-3.2-1B", n_query_groups=2).transformer.h[0].mlp,
        "fc_1 fc_2 proj config",
    ),
    "RMSNorm": (
        "litgpt",
        lambda: litgpt_model("Llama-3.2-1B", n_query_groups=2).transformer.ln_f,
        "weight eps dim add_unit_offset",
    ),
    "Fabric": ("lightning", fabric, "device strategy.precision _precision"),
    "LlamaModel": ("transformers", lambda: llama().model, LLAMA),
    "LlamaDecoderLayer": ("transformers", lambda: llama().model.layers[0], LAYER),
    "DynamicCache": ("transformers", used_cache, CACHE),
    "DynamicLayer": ("transformers", lambda: used_cache().layers[0], CACHE_LAYER),
}


def lost(library: str, kind: str, instance: Any, names: str) -> list[str]:
    """Return a sentence for each attribute that is gone."""
    gone = []
    for name in names.split():
        found = instance
        for part in name.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part, gone)
            if found is gone:
                gone.append(f"{library} {version(library)}: a {kind} has no {name}; upcast relies on it")
                break
    return gone


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_the_attributes_that_upcast_reads_are_there(kind: str) -> None:
    library, build, names = ATTRIBUTES[kind]
    pytest.importorskip(library)
    gone = lost(library, kind, build(), names)
    assert not gone, "\n".join(gone)


def test_a_lost_attribute_is_named() -> None:
    said = lost("torch", "Linear", torch.nn.Linear(2, 2), "weight.shape.0 bias nothing weight.nothing")
    start = f"torch {version('torch')}: a Linear has no "
    assert said == [f"{start}nothing; upcast relies on it", f"{start}weight.nothing; upcast relies on it"]


def test_a_transformers_layer_hands_over_what_the_fused_one_takes() -> None:
    """LlamaModel calls its layers with these names, which FusedDecoderLayer reads."""
    pytest.importorskip("transformers")
    model, given = llama(), set()
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    model(torch.tensor([[1, 2, 3]]))
    lost_names = {"attention_mask", "past_key_values", "position_embeddings"} - given
    assert not lost_names, f"transformers {version('transformers')}: LlamaModel no longer passes {lost_names}"


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

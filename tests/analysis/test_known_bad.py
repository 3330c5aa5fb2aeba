"""Models reported to overflow float16 (issues of their projects), each planted in a tiny instance of its architecture.

Every case fails in plain float16 in the way that was reported, with weights that float16 holds, and is right patched.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import assert_patched, relative_error
from tests.transformers_models import IDS, MOE, TEXT, first_output, make

pytest.importorskip("transformers")

from tests.coverage_table import text

BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}
Plant = Callable[[Any], None]


def fill(value: float, *names: str) -> Plant:
    """Set every parameter whose name ends so."""

    def plant(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.fill_(value)

    return plant


def scale(factor: float, *names: str) -> Plant:
    """Multiply every parameter whose name ends so."""

    def plant(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(names):
                parameter.mul_(factor)

    return plant


def neox_biases(model: Any) -> None:
    """Q and K biases with a norm of hundreds: scores beyond 65504."""
    for layer in model.gpt_neox.layers:
        bias = layer.attention.query_key_value.bias.view(4, 3, -1)
        bias[:, :2] = 300.0


def wo_of_t5(model: Any) -> None:
    """Outputs beyond 65504, which Transformers' T5 clamps in float16: finite, and wrong."""
    scale(3000.0, "wo.weight")(model)
    fill(300.0, "wi.weight")(model)


def fc2_of_opt(model: Any) -> None:
    """Outputs beyond 65504. Not one value for all of a row: the norm after it would leave rounding errors alone."""
    scale(3000.0, "fc2.weight")(model)
    fill(300.0, "fc1.bias")(model)


def wo_of_gated_t5(model: Any) -> None:
    """The same in the gated MLP of T5 v1.1, mT5 and FLAN-T5."""
    scale(3000.0, "wo.weight")(model)
    fill(20.0, "wi_0.weight", "wi_1.weight")(model)


# issue -> class, its config, sizes, inputs, what is planted, and what overflows
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Plant]] = {
    "Pythia and GPT-NeoX: scores, from large biases of q and k (litgpt 1715)": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**TEXT, "attn_implementation": "eager"},
        {"input_ids": IDS},
        neox_biases,
    ),
    "Phi-2: scores (transformers 28163)": (
        "PhiForCausalLM",
        "PhiConfig",
        {**TEXT, "attn_implementation": "eager", "qk_layernorm": False},
        {"input_ids": IDS},
        fill(260.0, "q_proj.bias", "k_proj.bias"),
    ),
    "Qwen2: scores of eager attention (transformers 33317)": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**TEXT, "attn_implementation": "eager"},
        {"input_ids": IDS},
        fill(260.0, "q_proj.bias", "k_proj.bias"),
    ),
    "T5: the output of wo, and the residual after it (transformers 4586)": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        BOTH,
        wo_of_t5,
    ),
    "mT5 and T5 v1.1: the output of wo after a gate (transformers 10830)": (
        "MT5ForConditionalGeneration",
        "MT5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
        BOTH,
        wo_of_gated_t5,
    ),
    "OPT: the residual under a large output projection (transformers 17433)": (
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 32, "max_position_embeddings": 64},
        {"input_ids": IDS},
        fc2_of_opt,
    ),
    "Gemma 3: the residual stream (transformers 36822)": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TEXT, "head_dim": 8},
        {"input_ids": IDS},
        fill(40000.0, "post_feedforward_layernorm.weight", "post_attention_layernorm.weight"),
    ),
    "gpt-oss: the residual grows until it passes 65504 (onnxruntime-genai 2444)": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**TEXT, **MOE, "head_dim": 8},
        {"input_ids": IDS},
        fill(45000.0, "o_proj.bias"),
    ),
    "GPT-Neo: the output projection of attention (transformers 11076)": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        {"input_ids": IDS},
        fill(30000.0, "out_proj.bias", "c_proj.bias"),
    ),
}


DOWN = ("down_proj.weight", "experts.down_proj", "dense_4h_to_h.weight")
NORMS = ("post_attention_layernorm.weight", "pre_feedforward_layernorm.weight")


def residual(model: Any) -> None:
    """A residual stream that the MLPs' output projections carry beyond 65504, with weights of hundreds."""
    fill(200.0, *NORMS)(model)
    scale(1e4, *DOWN)(model)


def delta_net(model: Any) -> None:
    """The output projection of a gated delta net, after its gated norm."""
    fill(3000.0, "linear_attn.norm.weight")(model)
    scale(1e4, "linear_attn.out_proj.weight")(model)


# issue -> model type of the coverage table, and what is planted
FAMILIES: dict[str, tuple[str, Plant]] = {
    "DeepSeek-V2: the residual (DeepSeek-V2 93)": ("deepseek_v2", residual),
    "GLM-4: the residual (ipex-llm 11299)": ("glm4", residual),
    "GLM-4 MoE (vLLM's list)": ("glm4_moe", residual),
    "Gemma 2 (vLLM's list)": ("gemma2", fill(40000.0, "post_feedforward_layernorm.weight")),
    "Qwen3 MoE (unsloth's list)": ("qwen3_moe", residual),
    "Qwen3.5: the gated delta net (unsloth's list)": ("qwen3_5_text", delta_net),
    "BLOOM: the residual": ("bloom", residual),
}  # PLaMo 2, of the same lists, is remote code and no model of Transformers


@pytest.mark.filterwarnings("ignore")  # Transformers' own, about tiny configs
@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_others_refuse_in_float16(name: str) -> None:
    kind, plant = FAMILIES[name]
    torch.manual_seed(0)
    model = next(case for case in text.cases() if case.name.startswith(f"{kind} (")).build().eval()
    with torch.no_grad():
        plant(model)
        assert all(parameter.half().isfinite().all() for parameter in model.parameters())
    model.half()
    inputs = {"input_ids": IDS}
    want = first_output(copy.deepcopy(model).float(), inputs)
    assert torch.isfinite(want).all()
    assert not torch.isfinite(first_output(model, inputs)).all()
    upcast.patch(model)
    assert_patched(model)
    assert relative_error(first_output(model, inputs), want) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_it_fails_in_float16_and_is_right_patched(name: str) -> None:
    kind, config, sizes, inputs, plant = CASES[name]
    model = make(kind, config, sizes)
    with torch.no_grad():
        plant(model)
    model.half()
    want = first_output(copy.deepcopy(model).float(), inputs)
    assert torch.isfinite(want).all()
    plain = first_output(model, inputs).float()
    assert not torch.isfinite(plain).all() or relative_error(plain, want) > 0.1
    upcast.patch(model)
    assert_patched(model)
    assert relative_error(first_output(model, inputs), want) < 1e-4


def test_opt_softmax_rows_that_are_masked_whole() -> None:
    """A padded row has no visible key: float16's smallest number plus a score is -inf, and the softmax of it NaN."""
    model = make(*CASES["OPT: the residual under a large output projection (transformers 17433)"][:3])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        fill(-40.0, "q_proj.bias")(model)
        fill(40.0, "k_proj.bias")(model)
    inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])}
    model.half()
    want = first_output(copy.deepcopy(model).float(), inputs)
    assert not torch.isfinite(first_output(model, inputs)).all()
    got = first_output(upcast.patch(model), inputs)
    assert relative_error(got, want) < 1e-4


class GatedConvolutions(nn.Module):
    """The stem of Gemma 3n's vision tower in small: convolutions with weights up to 98 (unsloth's report)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3)
        self.second = nn.Conv2d(64, 64, 3)
        self.norm = nn.GroupNorm(1, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(self.second(torch.relu(self.first(x))))
        return normed


def test_gemma_3n_convolutions_with_large_weights() -> None:
    model = GatedConvolutions().eval()
    with torch.no_grad():
        model.first.weight.uniform_(-98, 98)
        model.second.weight.uniform_(0, 98)
    model.half()
    x = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        want = copy.deepcopy(model).float()(x)
        assert not torch.isfinite(model(x.half())).all()
        assert relative_error(upcast.patch(model)(x), want) < 1e-4
    assert_patched(model)


def test_gemma_4_down_projection_after_the_gate() -> None:
    """gate * up passes 65504 before the down projection (unsloth-zoo 600), in an MLP of the Llama kind."""
    model = make("LlamaForCausalLM", "LlamaConfig", TEXT)
    with torch.no_grad():
        scale(60.0, "gate_proj.weight", "up_proj.weight")(model)
        fill(200.0, "post_attention_layernorm.weight")(model)
    model.half()
    inputs = {"input_ids": IDS}
    want = first_output(copy.deepcopy(model).float(), inputs)
    assert not torch.isfinite(first_output(model, inputs)).all()
    assert relative_error(first_output(upcast.patch(model), inputs), want) < 1e-4

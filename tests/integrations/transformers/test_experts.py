"""Experts that lie in one parameter, in one native call: against the unpatched model, and what must undo it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import relative_error, rounded
from tests.integrations.transformers.test_cache import generated
from tests.transformers_models import IDS, TEXT, make
from upcast.integrations.transformers.experts import FusedExperts
from upcast.kernels import native

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not there")

WIDE = {**TEXT, "hidden_size": 64, "intermediate_size": 96}  # rows of 64 and longer are what is packed
MANY = {**WIDE, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 72}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("Qwen3Moe", {**MANY, "head_dim": 8}),
    "Qwen2-MoE, a shared expert": ("Qwen2Moe", {**MANY, "shared_expert_intermediate_size": 40}),
    "OLMoE": ("Olmoe", {**WIDE, "num_experts": 8, "num_experts_per_tok": 3}),
    "DeepSeek-V3, dense layers first": (
        "DeepseekV3",
        {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2}
        | {"topk_group": 1, "moe_intermediate_size": 72, "first_k_dense_replace": 1},
    ),
    "gelu": ("Mixtral", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu_pytorch_tanh"}),
}
IN_ONE_CALL = ("Mixtral", "Qwen3-MoE", "Qwen2-MoE, a shared expert", "gelu")  # their attention, too


def model_of(kind: str, storage: str = "float16") -> Any:
    name, sizes = KINDS[kind]
    model = make(f"{name}ForCausalLM", f"{name}Config", sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() >= 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
            if storage == "packed" and parameter.dim() >= 2:
                parameter.copy_(parameter.bfloat16().half())  # numbers that both formats hold
    return model


def mixtures(model: Any) -> list[FusedExperts]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, FusedExperts)]


def calls(model: Any) -> int:
    return sum(forward.calls for forward in mixtures(model))


@pytest.mark.parametrize("storage", ["float16", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_run_in_one_call(kind: str, storage: str) -> None:
    model = model_of(kind, storage)
    plain = rounded(copy.deepcopy(model))
    attends = kind in IN_ONE_CALL
    # elsewhere a cache in float16 only tips routers that are near a tie
    upcast.patch(model, storage=storage, kv_cache="float16" if attends else "float32")
    with torch.inference_mode():
        assert relative_error(model(IDS).logits, plain(IDS).logits) < 1e-5
    layers = len(mixtures(model))
    assert layers == (1 if "dense" in kind else 2)
    assert calls(model) == layers
    want, _ = generated(plain)
    got, _ = generated(model)
    assert relative_error(got, want) < (2e-3 if attends else 3e-5)
    ones = [layer.__dict__["forward"].calls for layer in model.model.layers if "forward" in layer.__dict__]
    assert (min(ones, default=0) > 0) == attends


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_with_each_of_the_library_s_implementations(way: str) -> None:
    model = model_of("Qwen3-MoE")
    plain = rounded(copy.deepcopy(model))
    for each in (model, plain):
        each.set_experts_implementation(way)
    upcast.patch(model)
    with torch.inference_mode():
        assert relative_error(model(IDS).logits, plain(IDS).logits) < 1e-5
    assert calls(model) == 2


Change = Callable[[list[Any], pytest.MonkeyPatch], None]


def _registered(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    table = moe.ALL_EXPERTS_FUNCTIONS._global_mapping
    own = table["grouped_mm"]
    monkeypatch.setitem(table, "grouped_mm", lambda *args: own(*args) * 2)


def _of_another_name(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    own = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", lambda *args: own(*args) + 1)
    for model in models:
        model.config._experts_implementation = "mine"


def _another_gate(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(models[0].model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "_apply_gate", lambda self, x: torch.tanh(x.chunk(2, dim=-1)[0]))


def _another_forward(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(models[0].model.layers[0].mlp.experts)
    monkeypatch.setattr(kind, "forward", lambda self, x, index, weights: x * weights.sum(-1, keepdim=True))


def in_the_first(change: Callable[[Any], object]) -> Change:
    """A change of the first layer's experts."""

    def make_change(models: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.no_grad():
            for model in models:
                change(model.model.layers[0].mlp.experts)

    return make_change


def _another_activation(experts: Any) -> None:
    experts.act_fn = torch.nn.Tanh()


def _other_parameter(experts: Any) -> None:
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().float().clone() * 2)


# What a program does, and how many of two mixtures run in one call afterwards.
CHANGES: dict[str, tuple[Change, int]] = {
    "an implementation that is replaced": (_registered, 0),
    "one of another name": (_of_another_name, 0),
    "another gate": (_another_gate, 0),
    "another forward": (_another_forward, 0),
    "another activation": (in_the_first(_another_activation), 1),
    "a hook on the activation": (
        in_the_first(lambda experts: experts.act_fn.register_forward_hook(lambda module, args, y: y + 0.1)),
        1,
    ),
    "a hook on the experts": (
        in_the_first(lambda experts: experts.register_forward_hook(lambda module, args, y: y * 2)),
        2,
    ),
    "a weight that is written to": (in_the_first(lambda experts: experts.down_proj[2].mul_(2)), 2),
    "another parameter": (in_the_first(_other_parameter), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_program_changes_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_change, left = CHANGES[change]
    model = model_of("Qwen3-MoE")
    plain = rounded(copy.deepcopy(model))
    upcast.patch(model)
    with torch.inference_mode():
        before = model(IDS).logits
    assert calls(model) == 2
    make_change([model, plain], monkeypatch)
    with torch.inference_mode():
        got, want = model(IDS).logits, plain(IDS).logits
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, before) > 1e-3
    assert calls(model) == 2 + left


def test_gradients_flow_as_without_it() -> None:
    """To what comes in, and to the weights of the choices, through experts that do not learn."""
    model = model_of("Mixtral")
    plain = rounded(copy.deepcopy(model))
    upcast.patch(model)
    found = []
    for each in (model, plain):
        experts = each.model.layers[0].mlp.experts.requires_grad_(False)
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 2.0]], requires_grad=True)
        experts(x, torch.tensor([[0, 1], [2, 3], [1, 3]]), weights).square().sum().backward()
        found.append((x.grad, weights.grad))
    assert calls(model) == 0
    for got, want in zip(*found, strict=True):
        assert got is not None
        assert want is not None
        assert relative_error(got, want) < 1e-5


def test_a_choice_that_is_no_expert_is_for_the_library() -> None:
    """One more than there are stands for an expert on another machine; Transformers leaves it out."""
    model = model_of("Mixtral")
    plain = rounded(copy.deepcopy(model))
    upcast.patch(model)
    x, weights = torch.randn(2, 64), torch.rand(2, 2)
    choices = torch.tensor([[0, 4], [4, 2]])
    found = []
    for each in (model, plain):
        each.set_experts_implementation("batched_mm")
        with torch.inference_mode():
            found.append(each.model.layers[0].mlp.experts(x, choices, weights))
    assert relative_error(*found) < 1e-5


def test_a_copy_and_an_unpatched_model_are_their_own() -> None:
    model = upcast.patch(model_of("Mixtral"))
    with torch.inference_mode():
        before = model(IDS).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.experts.gate_up_proj.mul_(2)
    with torch.inference_mode():
        assert relative_error(other(IDS).logits, before) > 1e-3
        assert torch.equal(model(IDS).logits, before)
    assert calls(other) == calls(model) == 4  # a copy goes on counting
    upcast.unpatch(model)
    assert not mixtures(model)
    with torch.inference_mode():
        assert relative_error(model(IDS).logits, before) < 1e-5

"""The autograd functions around the kernels, and the fused forwards under gradients: float32's, and less is kept."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error
from tests.fused_models import IDS, NAMES, fused_of, pair, without_fusion
from upcast import kernels
from upcast.integrations.litgpt.lora import FusedLoRAQKV
from upcast.integrations.litgpt.modules import FusedAttention, FusedGatedMLP, FusedRMSNorm
from upcast.kernels import gradients as gradients_module
from upcast.kernels import portable, reference

TOLERANCE = 1e-5


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v, start=0, scale=0.3)


WEIGHT = randn(7)
COS, SIN = randn(4, 6, seed=1), randn(4, 6, seed=2)  # halves that turn by different angles, and one element at rest
Function = Callable[..., Any]

# name, the differentiable kernel, its reference twin, inputs that need gradients
FUNCTIONS: list[tuple[str, Function, Function, tuple[Tensor, ...]]] = [
    (
        "rms_norm",
        lambda x: kernels.rms_norm(x, _as(WEIGHT, x), 1e-3),
        lambda x: reference.rms_norm(x, WEIGHT, 1e-3),
        (randn(3, 7),),
    ),
    (
        "rms_norm, 1 + w",
        lambda x: kernels.rms_norm(x, _as(WEIGHT, x), 0.1, True),
        lambda x: reference.rms_norm(x, WEIGHT, 0.1, True),
        (randn(2, 3, 7),),
    ),
    ("rms_norm, no w", kernels.rms_norm, reference.rms_norm, (randn(3, 7),)),
    *(
        (
            f"gated {kind}",
            lambda g, u, kind=kind: kernels.gated(g, u, kind),
            lambda g, u, kind=kind: reference.gated(g, u, kind),
            (randn(3, 5), randn(3, 5, seed=1)),
        )
        for kind in ("silu", "gelu", "gelu_tanh")
    ),
    (
        "rope",
        lambda x: kernels.rope(x, _as(COS, x), _as(SIN, x)),
        lambda x: reference.rope(x, COS, SIN),
        (randn(2, 3, 4, 7),),
    ),
    (
        "attention",
        lambda *x: kernels.causal_attention(*x, 0.3),
        attention,
        (randn(2, 4, 5, 6), randn(2, 2, 5, 6), randn(2, 2, 5, 6, seed=1)),
    ),
    (
        "attention, no groups",
        lambda *x: kernels.causal_attention(*x, 0.3),
        attention,
        tuple(randn(1, 2, 5, 4, seed=i) for i in range(3)),
    ),
]
EACH = pytest.mark.parametrize(
    ("function", "twin", "inputs"), [pytest.param(*rest, id=name) for name, *rest in FUNCTIONS]
)


def test_every_autograd_function_has_its_check() -> None:
    """Linear's is in test_learning.py, where its product is one of doubles; NestedLinear's is in test_transforms.py."""
    functions = {name for name, each in vars(gradients_module).items() if isinstance(each, type)}
    functions = {name for name in functions if issubclass(getattr(gradients_module, name), torch.autograd.Function)}
    found = {"Linear", "NestedLinear"}
    for _, function, _, inputs in FUNCTIONS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_active", portable)
            found.add(type(function(*(each.clone().requires_grad_() for each in inputs)).grad_fn).__name__)
    assert functions == {name.removesuffix("Backward") for name in found}
    assert len(functions) == 6


def _as(tensor: Tensor, other: Tensor) -> Tensor:
    return tensor.to(other.dtype)


@EACH
def test_gradcheck_in_double_through_the_reference_twin(
    monkeypatch: pytest.MonkeyPatch, function: Function, twin: Function, inputs: tuple[Tensor, ...]
) -> None:
    monkeypatch.setattr(kernels, "_active", portable)  # the reference kernels, which take any dtype
    inputs = tuple(each.clone().requires_grad_() for each in inputs)
    torch.testing.assert_close(function(*inputs), twin(*inputs))
    assert torch.autograd.gradcheck(function, inputs)
    if function is not FUNCTIONS[-1][1] and function is not FUNCTIONS[-2][1]:  # torch's flash attention has no second
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.usefixtures("each_kernels")
@EACH
def test_gradients_are_the_twin_s_in_double(function: Function, twin: Function, inputs: tuple[Tensor, ...]) -> None:
    wide = [each.clone().requires_grad_() for each in inputs]
    narrow = [each.float().requires_grad_() for each in inputs]
    want, got = twin(*wide), function(*narrow)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-6
    grad = randn(*want.shape, seed=9)
    want.backward(grad)
    got.backward(grad.float())
    for wanted, found in zip(wide, narrow, strict=True):
        assert relative_error(found.grad, wanted.grad) < 1e-6
    for i in range(len(inputs)):  # each alone
        parts = [each.detach().requires_grad_(i == j) for j, each in enumerate(narrow)]
        function(*parts).backward(grad.float())
        assert [each.grad is not None for each in parts] == [i == j for j in range(len(parts))]
        assert relative_error(parts[i].grad, wide[i].grad) < 1e-6


def kept_by(function: Function, *inputs: Tensor) -> int:
    """Return the bytes that autograd holds for the backward pass, beside the inputs."""
    kept: dict[int, int] = {}
    owned = {each.untyped_storage().data_ptr() for each in inputs}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    del result
    return sum(kept.values())


def test_what_is_kept_is_less_than_torch_keeps() -> None:
    gate, up = (torch.randn(64, 96).requires_grad_() for _ in range(2))
    assert kept_by(lambda *x: kernels.gated(*x, "silu"), gate, up) == 0
    assert kept_by(lambda g, u: F.silu(g) * u, gate, up) == gate.nbytes
    assert kept_by(kernels.rms_norm, gate) == 0
    q, k, v = (torch.randn(2, heads, 32, 16).requires_grad_() for heads in (6, 2, 2))
    once = kept_by(lambda *x: kernels.causal_attention(*x, 0.25), q, k, v)
    repeated = kept_by(
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), is_causal=True
        ),
        q,
        k,
        v,
    )
    assert repeated - once == 2 * q.nbytes


# --- fused forwards under gradients -----------------------------------------------------------------------------------


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of something learned that is added to the embedding."""
    offset = nn.Parameter(torch.zeros(model.config.n_embd))
    hook = model.transformer.wte.register_forward_hook(lambda module, args, out: out + offset)
    logits = model.requires_grad_(False)(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    hook.remove()
    assert offset.grad is not None
    return logits, offset.grad


@pytest.mark.parametrize("name", NAMES)
def test_litgpt_s_fused_modules_train_as_unfused(name: str) -> None:
    model, plain = pair(name, "float32")
    (got, grad), (want, wanted) = (gradients(each, IDS) for each in (model, plain))
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(grad, wanted) < 5e-5
    for forward in fused_of(model).values():
        if isinstance(forward, (FusedRMSNorm, FusedGatedMLP)):
            assert forward.calls > 0
        if isinstance(forward, FusedAttention):
            assert forward.calls == int(forward._plain())


def test_lora_s_modules_are_fused_and_an_adapter_s_attention_is_not() -> None:
    from litgpt import adapter, lora

    from tests.litgpt_checkpoints import small_config

    shape = small_config("SmolLM2-135M-Instruct")
    kinds = {}
    for library, extra in ((lora, {"lora_r": 2, "lora_query": True, "lora_mlp": True}), (adapter, {})):
        config = library.Config(**{**asdict(shape), **extra})
        model = library.GPT(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name or "adapter" in name or "gating" in name)
            if "lora_B" in name or "gating" in name:
                nn.init.normal_(parameter.data)
        upcast.patch(model)
        kinds[library] = {type(forward) for forward in fused_of(model).values() if forward.calls == 0}
        plain = without_fusion(model)
        for each in (model, plain):
            F.cross_entropy(each(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                assert relative_error(parameter.grad, plain.get_parameter(name).grad) < TOLERANCE, name
        assert all(forward.calls == 1 for forward in fused_of(model).values() if forward.module is not model)
    assert {FusedRMSNorm, FusedGatedMLP, FusedAttention} <= kinds[lora]
    assert FusedAttention not in kinds[adapter]


# name, the settings of LoRA, heads and groups of keys
QKV: list[tuple[str, dict[str, Any], int, int]] = [
    ("q and v", {"lora_query": True, "lora_value": True}, 4, 2),
    ("q, k and v", {"lora_query": True, "lora_key": True, "lora_value": True}, 4, 2),
    ("k alone", {"lora_key": True}, 4, 4),
    ("q and v, no groups", {"lora_query": True, "lora_value": True}, 4, 4),
    ("one group", {"lora_query": True, "lora_key": True, "lora_value": True}, 4, 1),
    ("dropout", {"lora_query": True, "lora_value": True, "lora_dropout": 0.5}, 4, 2),
]


@pytest.mark.parametrize(("settings", "heads", "groups"), [pytest.param(*rest, id=name) for name, *rest in QKV])
def test_lora_on_q_k_and_v_is_litgpt_s(settings: dict[str, Any], heads: int, groups: int) -> None:
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    shape = {"n_layer": 2, "n_embd": 48, "n_head": heads, "n_query_groups": groups, "head_size": 16, "block_size": 32}
    model = GPT(Config(**shape, padded_vocab_size=97, lora_r=3, lora_alpha=5, **settings))
    mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter.data)
    upcast.patch(model.train())
    plain = without_fusion(model)
    logits = []
    for each in (model, plain):
        torch.manual_seed(3)
        logits.append(each(IDS % 97))
        F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), IDS[:, 1:].flatten() % 97).backward()
    assert relative_error(*logits) < TOLERANCE
    fused = {n: f for n, f in fused_of(model).items() if isinstance(f, FusedLoRAQKV)}
    assert [forward.calls for forward in fused.values()] == [1, 1]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "qkv" in name:
            assert relative_error(parameter.grad, plain.get_parameter(name).grad) < TOLERANCE, name


def test_a_norm_that_learns_runs_its_own_forward() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    grads = []
    for each in (model, plain):
        weight = each.transformer.ln_f.weight
        weight.requires_grad_()
        F.cross_entropy(each(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        grads.append(weight.grad)
    assert relative_error(*grads) < TOLERANCE
    assert fused_of(model)["transformer.ln_f"].calls == 0

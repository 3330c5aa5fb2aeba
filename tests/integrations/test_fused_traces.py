"""Who looks inside a fused model sees what LitGPT shows; copies and unpatching leave no trace."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error
from tests.fused_models import (
    IDS,
    calls,
    fused_of,
    make,
    pair,
    steps,
)
from tests.litgpt_checkpoints import small_config
from upcast.integrations.litgpt import install

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")


# --- who looks inside sees what LitGPT shows --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "pythia-160m", "Gemma-3-4b-it", "Mixtral-8x7B-v0.1"])
def test_hooks_see_what_they_would_see(name: str) -> None:
    """Every module in turn is watched: the same calls with the same numbers, also of the cache."""
    model, plain = pair(name, "float32")
    for each in (model, plain):
        each.set_kv_cache(1, 32)
    for watched in [name for name, _ in model.named_modules() if ".h.1" in name or name.count(".") < 2]:
        seen: list[list[tuple[Tensor, ...]]] = [[], []]
        for each, notes in zip((model, plain), seen, strict=True):

            def note(_: nn.Module, args: Any, output: Any, notes: list[Any] = notes) -> None:
                outputs = output if isinstance(output, tuple) else (output,)
                notes.append(tuple(t.clone() for t in (*args, *outputs) if isinstance(t, Tensor)))

            handle = each.get_submodule(watched).register_forward_hook(note)
            each(IDS[:1, :5], torch.arange(5), input_pos_maxp1=5)
            handle.remove()
        assert len(seen[0]) == len(seen[1]), watched
        for got, want in zip(*seen, strict=True):
            assert [t.shape for t in got] == [t.shape for t in want], watched
            assert all(relative_error(a.float(), b.float()) < 1e-5 for a, b in zip(got, want, strict=True)), watched


def test_a_hook_can_change_what_flows() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    for each in (model, plain):
        each.transformer.h[1].mlp.fc_1.register_forward_hook(lambda _, args, output: output * 2)
    assert relative_error(model(IDS), plain(IDS)) < 1e-5
    assert relative_error(model(IDS), usual) > 1e-3


def test_the_call_per_block_comes_back_when_the_hooks_are_gone() -> None:
    model, _ = pair("SmolLM2-135M-Instruct", "float32")
    forward = model.__dict__["forward"]
    handle = model.transformer.h[1].mlp.proj.register_forward_hook(lambda *_: None)
    model(IDS)
    assert forward.calls == 0
    handle.remove()
    model(IDS)
    assert forward.calls == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(IDS)
    handle.remove()
    assert forward.calls == 1


def _other_eps(model: Any) -> None:
    model.transformer.h[1].norm_2.eps = 3.0


def _other_scale(model: Any) -> None:
    model.config.attention_scores_scalar = 1


def _other_numbers(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.fc_1.weight.mul_(2.0)


def _other_forward(model: Any) -> None:
    model.transformer.h[0].mlp.proj.forward = lambda x: x.sum() + torch.zeros(*x.shape[:2], 32)


def _other_parameter(model: Any) -> None:
    model.transformer.h[0].norm_1.weight = nn.Parameter(torch.full((32,), 3.0))


def _other_order(model: Any) -> None:
    model.transformer.h = nn.ModuleList(reversed(model.transformer.h))


@pytest.mark.parametrize(
    "change", [_other_eps, _other_scale, _other_numbers, _other_forward, _other_parameter, _other_order]
)
def test_changes_after_the_first_call_count(change: Any) -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    assert model.__dict__["forward"].calls == 1
    for each in (model, plain):
        change(each)
    got = model(IDS)
    assert relative_error(got, plain(IDS)) < 1e-5
    assert relative_error(got, usual) > 1e-3


def test_a_replaced_layer_runs() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    usual = model(IDS)
    new = nn.Linear(32, 96, bias=False)
    for each in (model, plain):
        each.transformer.h[1].mlp.fc_1 = new
    assert relative_error(model(IDS), plain(IDS)) < 1e-5
    assert relative_error(model(IDS), usual) > 1e-3


@torch.inference_mode(False)
def test_gradients_reach_vectors_and_inputs() -> None:
    model, plain = pair("SmolLM2-135M-Instruct", "float32")
    vectors = [name for name, parameter in plain.named_parameters() if parameter.dim() < 2]
    assert vectors
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.dim() < 2)
        each(IDS).square().sum().backward()
    for name in vectors:
        assert relative_error(model.get_parameter(name).grad, plain.get_parameter(name).grad) < 1e-5
    model.requires_grad_(False)
    before = calls(model)
    model(IDS)  # gradients are on, but nothing asks for one
    assert calls(model) > before


# --- traces and copies ------------------------------------------------------------------------------------------------


def _traces(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def test_unpatch_leaves_no_trace() -> None:
    model = make("Gemma-3-4b-it")
    model.set_kv_cache(1)
    model.clear_kv_cache()  # leaves a trace of LitGPT's own
    before = _traces(model)
    upcast.patch(model)
    assert _traces(model) != before
    list(steps(model, 1, True))
    model.clear_kv_cache()
    upcast.unpatch(model)
    assert _traces(model) == before
    with upcast.patched(model):
        assert fused_of(model)
    assert _traces(model) == before
    upcast.patch(model)
    model.set_kv_cache(1, 32)
    upcast.unpatch(model)  # with the cache still there: LitGPT's own from now on
    model(IDS[:1, :4], torch.arange(4))
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.float32


def test_a_forward_of_the_user_s_own_is_left_alone() -> None:
    model = make("SmolLM2-135M-Instruct")
    seen: list[int] = []
    mlp = model.transformer.h[0].mlp
    own = lambda x: seen.append(1) or type(mlp).forward(mlp, x)  # noqa: E731
    mlp.forward = own
    upcast.patch(model)
    model(IDS)
    assert seen == [1]
    upcast.unpatch(model)
    assert mlp.__dict__["forward"] is own


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_their_own_weights(copier: Any) -> None:
    model = upcast.patch(make("SmolLM2-135M-Instruct"))
    model.set_kv_cache(1, 32)
    want = model(IDS[:1, :6], torch.arange(6))
    other = copier(model)
    assert fused_of(other).keys() == fused_of(model).keys()
    for name, forward in fused_of(other).items():
        assert forward.module is other.get_submodule(name)
    before = calls(model)
    assert torch.equal(other(IDS[:1, :6], torch.arange(6)), want)
    assert calls(model) == before
    with torch.no_grad():
        other.lm_head.weight.zero_()
        other.transformer.h[0].attn.kv_cache.k.zero_()
    assert torch.equal(model(IDS[:1, :6], torch.arange(6)), want)
    upcast.unpatch(other)
    assert fused_of(model)
    assert not fused_of(other)


def test_other_models_are_left_alone() -> None:
    model = upcast.patch(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).eval())
    assert not fused_of(model)


def test_what_stays_unfused_has_a_reason() -> None:
    model = upcast.patch(make("Mixtral-8x7B-v0.1", rotary_percentage=0.4))
    reasons = install.unfused(model)
    assert reasons["transformer.h.0.attn"] == "rope of an odd number of elements"
    assert "transformer.h.0.mlp" not in reasons
    assert not fused_of(model).keys() & reasons.keys()


REMARKS = [
    ("Mixtral-8x7B-v0.1", {"rotary_percentage": 0.4}, "not fused: {}transformer.h.0.attn and 2 more (rope of an odd "),
    ("Mixtral-8x7B-v0.1", {}, ""),
]


@pytest.mark.parametrize(("name", "changes", "remark"), REMARKS)
def test_the_plan_and_the_report_say_what_stays_unfused(
    name: str, changes: dict[str, Any], remark: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litgpt import GPT

    monkeypatch.setenv("UPCAST_VERBOSE", "2")
    model = GPT(small_config(name, **changes)).eval()
    inside = torch.nn.ModuleDict({"language": GPT(small_config(name, **changes))}).eval()
    assert str(upcast.plan(inside)).count("not fused") == bool(remark)
    assert remark.format("language.") in str(upcast.plan(inside))
    assert remark.format("") in str(upcast.plan(model)).splitlines()[-1]
    upcast.patch(model)
    for text in (upcast.report(model), capsys.readouterr().err):
        assert text.count("not fused") == bool(remark)
        assert remark.format("") in text

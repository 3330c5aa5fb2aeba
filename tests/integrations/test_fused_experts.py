"""LitGPT's mixture of experts, fused: only the chosen experts run, and the sums are LitGPT's."""

from typing import Any

import pytest
import torch

from tests.conftest import relative_error
from tests.fused_models import IDS, make, pair, without_fusion
from upcast.integrations.litgpt.gpt import FusedGPT
from upcast.integrations.litgpt.moe import FusedMoE
from upcast.kernels import mixture as kernel
from upcast.kernels import native

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")

MIXTRAL = "Mixtral-8x7B-v0.1"
# DeepSeek's kind: experts in groups, shared ones, weights scaled.
GROUPED = {
    "n_expert": 8,
    "n_expert_per_token": 2,
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "n_shared_expert": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_intermediate_size": 24,
}


def rows_of_experts(model: Any, block: int) -> dict[int, list[int]]:
    """Rows that each expert of a block gets, by wrapping what runs rather than by hooks."""
    seen: dict[int, list[int]] = {}
    for index, expert in enumerate(model.transformer.h[block].mlp.experts):
        forward = expert.forward

        def count(x: torch.Tensor, index: int = index, forward: Any = forward) -> torch.Tensor:
            seen.setdefault(index, []).append(len(x))
            return forward(x)  # type: ignore[no-any-return]

        expert.__dict__["forward"] = count
    return seen


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=["softmax of the chosen", "groups, shared, scaled"])
def test_it_is_litgpt_s_mixture(changes: dict[str, Any]) -> None:
    model, plain = pair(MIXTRAL, "float32", **changes)
    x = torch.randn(2, 7, model.config.n_embd, generator=torch.Generator().manual_seed(3))
    for got, want in zip(model.transformer.h, plain.transformer.h, strict=True):
        assert isinstance(got.mlp.forward, FusedMoE)
        assert relative_error(got.mlp(x), want.mlp(x)) < 1e-6
        assert got.mlp.forward.calls == 1
    assert relative_error(model(IDS), plain(IDS)) < 1e-5


@pytest.fixture
def mixtures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every mixture that ran in one native call."""
    rows: list[int] = []
    mixture = kernel.mixture

    def note(x: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(x))
        return mixture(x, *args)

    monkeypatch.setattr(kernel, "mixture", note)
    return rows


NORMS = {"post_attention_norm": True, "post_mlp_norm": True}


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
@pytest.mark.parametrize("changes", [{}, NORMS, GROUPED], ids=["plain", "norms behind", "groups"])
def test_a_model_of_experts_runs_by_native_calls(changes: dict[str, Any], mixtures: list[int]) -> None:
    """A prompt and tokens after it: one call for each attention and one for each mixture."""
    model, plain = pair(MIXTRAL, "float32", **changes)
    for each in (model, plain):
        each.set_kv_cache(1, 30)
    for start, end in ((0, 7), (7, 8), (8, 12)):
        positions = torch.arange(start, end)
        assert relative_error(model(IDS[:1, start:end], positions), plain(IDS[:1, start:end], positions)) < 1e-5
    whole = model.forward
    assert isinstance(whole, FusedGPT)
    assert whole.calls == 3
    layers = model.config.n_layer
    assert mixtures == [7] * layers + [1] * layers + [4] * layers
    assert all(block.attn.forward.calls == 0 for block in model.transformer.h)


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
def test_what_is_done_to_an_expert_is_seen(mixtures: list[int]) -> None:
    """In place, by another parameter, by another forward: of one that the native call took before."""
    model, plain = pair(MIXTRAL, "float32")

    def doubled(layer: Any) -> None:
        layer.weight.mul_(2)

    def exchanged(layer: Any) -> None:
        layer.weight = torch.nn.Parameter(torch.full(layer.weight.shape, 0.01))

    def wrapped(layer: Any) -> None:
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) + 1

    with torch.no_grad():
        for change in (doubled, exchanged, wrapped):
            before = model(IDS)
            for each in (model, plain):
                for expert in each.transformer.h[1].mlp.experts:
                    change(expert.proj)
            assert relative_error(model(IDS), plain(IDS)) < 1e-5, change
            assert relative_error(model(IDS), before) > 1e-2, change
    assert mixtures


# Functions that the router and the experts stand on, and what a program puts in their place.
REPLACED: dict[str, tuple[Any, str, Any]] = {
    "topk": (torch, "topk", lambda own: lambda x, *args, **options: own(-x, *args, **options)),
    "softmax": (torch.Tensor, "softmax", lambda own: lambda x, *args, **options: own(x * 3, *args, **options)),
    "silu": (torch.nn.functional, "silu", lambda own: lambda x: x.clamp(min=0)),
    "Linear": (torch.nn.Linear, "forward", lambda own: lambda layer, x: own(layer, x) * 1.5),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_program_replaces_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the native calls have run."""
    owner, attribute, make_other = REPLACED[name]
    model, plain = pair(MIXTRAL, "float32")
    before = model(IDS)
    monkeypatch.setattr(owner, attribute, make_other(getattr(owner, attribute)))
    assert relative_error(model(IDS), plain(IDS)) < 1e-5
    assert relative_error(model(IDS), before) > 1e-2
    monkeypatch.undo()
    assert torch.equal(model(IDS), before)


def test_experts_that_change_places() -> None:
    model, plain = pair(MIXTRAL, "float32")
    model(IDS)
    for each in (model, plain):
        experts = each.transformer.h[0].mlp.experts
        experts[0], experts[1] = experts[1], experts[0]
    assert relative_error(model(IDS), plain(IDS)) < 1e-5


@pytest.mark.parametrize("where", ["before", "after"])
def test_fewer_experts_than_the_config_says(where: str) -> None:
    """LitGPT leaves out the ones that are not there."""
    model, plain = pair(MIXTRAL, "float32")
    for each in (model, plain):
        if where == "after":
            each(IDS)
        del each.transformer.h[0].mlp.experts[-1]
    assert relative_error(model(IDS), plain(IDS)) < 1e-5


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
def test_native_calls_come_back_when_a_hook_is_gone(mixtures: list[int]) -> None:
    model, plain = pair(MIXTRAL, "float32")
    layers, expert = model.config.n_layer, model.transformer.h[0].mlp.experts[1]
    for hooked in (False, True, True, False, False, True):
        handle = expert.register_forward_hook(lambda *_: None) if hooked else None
        assert relative_error(model(IDS[:1]), plain(IDS[:1])) < 1e-5
        assert len(mixtures) == layers - hooked
        mixtures.clear()
        if handle is not None:
            handle.remove()


@pytest.mark.skipif(not native.available(), reason="the native library is not there")
def test_what_a_prompt_is_computed_from_is_not_known() -> None:
    """Experts are called as modules, and are no part of what a kept prefix is compared by."""
    model, _ = pair(MIXTRAL, "float16")
    model(IDS)
    assert model.forward.stack.made_with() is None


def test_a_token_calls_the_experts_it_chose_and_no_other() -> None:
    model, _ = pair(MIXTRAL, "float16")
    chosen = model.config.n_expert_per_token
    seen = rows_of_experts(model, 1)
    model.set_kv_cache(1, 30)
    model(IDS[:1, :7], torch.arange(7))
    assert sum(map(sum, seen.values())) == 7 * chosen
    seen.clear()
    model(IDS[:1, 7:8], torch.tensor([7]))
    assert len(seen) == chosen < model.config.n_expert
    assert all(rows == [1] for rows in seen.values())


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_hook_on_an_expert_is_called_as_without_fusion(where: str) -> None:
    """Of every expert, with no token for most; of the gate, once: also where the first call came before the hooks."""
    model = without_fusion(pair(MIXTRAL, "float16")[0])
    fused = pair(MIXTRAL, "float16")[0]
    found: list[list[tuple[str, int]]] = []
    for each in (model, fused):
        if where == "after":
            each(IDS[:1, :3])
        moe, seen, handles = each.transformer.h[0].mlp, list[tuple[str, int]](), list[Any]()
        for name, module in [("gate", moe.gate), *((str(i), expert.fc_1) for i, expert in enumerate(moe.experts))]:

            def note(_: Any, args: Any, output: Any, name: str = name, seen: Any = seen) -> None:
                seen.append((name, output.shape[-2]))

            handles.append(module.register_forward_hook(note))
        each(IDS[:1, :3])
        for handle in handles:
            handle.remove()
        each(IDS[:1, :3])
        found.append(seen)
    assert found[0] == found[1]
    assert len(found[0]) == 1 + make(MIXTRAL).config.n_expert


def test_an_expert_that_is_replaced_is_called() -> None:
    model, plain = pair(MIXTRAL, "float32")
    model(IDS[:1])
    for each in (model, plain):
        each.transformer.h[0].mlp.experts[0] = torch.nn.Identity()
    assert relative_error(model(IDS), plain(IDS)) < 1e-5

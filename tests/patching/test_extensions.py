"""An integration from outside: a toy library, its fused forward, its wrapper and its cache, registered like ours."""

import copy
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import Run, assert_patched, half_weights, relative_error, rounded
from upcast.core import extensions
from upcast.core.extensions import Extension
from upcast.core.forward_override import Forward, in_effect, push, remove, stack
from upcast.core.module_tree import modules
from upcast.guard.snapshot import State

LIBRARIES = ["litgpt", "transformers", "diffusers", "lightning", "peft", "accelerate", "matplotlib"]


# --- the library ------------------------------------------------------------------------------------------------------


class ToyNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class ToyCache:
    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # what a step appends
        self.total = torch.zeros(6)  # what it changes in place


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = ToyNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor, cache: ToyCache | None = None) -> Any:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        if cache is not None:
            cache.rows = [*cache.rows, x]
            cache.total += x.sum(0)
        return x


class ToyWrapper:
    """What the library's users hand over."""

    def __init__(self, inside: ToyModel | None) -> None:
        self.inside = inside


# --- the integration --------------------------------------------------------------------------------------------------


class FusedNorm(Forward):
    owner = "toy"
    fast = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.calls = 0

    def __call__(self, x: Tensor) -> Any:
        self.calls += 1
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), self.module.weight, 1e-6)


class Toy(Extension):
    name = "toy"
    installs = True

    def unwrap(self, model: object) -> object:
        if isinstance(model, ToyWrapper) and model.inside is None:
            raise upcast.UpcastError("a ToyWrapper with nothing inside. Fill it first.")
        return model.inside if isinstance(model, ToyWrapper) else model

    def install(self, root: nn.Module, kv_cache: str) -> None:
        for module in modules(root):
            if type(module) is ToyNorm:
                push(module, FusedNorm(module))
                if not self.installs:
                    raise RuntimeError("planted")

    def remarks(self, root: nn.Module) -> list[str]:
        return ["toy: norms are fused"] if isinstance(root, ToyModel) else []

    def appended(self, state: object) -> frozenset[str]:
        return frozenset({"rows"}) if isinstance(state, ToyCache) else frozenset()


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    extensions.registered()  # so that none that is expected comes while this one is there
    monkeypatch.setattr(extensions, "_registered", dict(extensions._registered))
    extension = Toy()
    extensions.register(extension)
    return extension


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_a_wrapper_is_patched_inside_and_runs_fused() -> None:
    wrapper = ToyWrapper(ToyModel().eval())
    plain = rounded(wrapper.inside)
    assert "toy: norms are fused" in upcast.plan(wrapper).remarks
    assert upcast.patch(wrapper) is wrapper
    assert_patched(wrapper.inside)
    assert relative_error(wrapper.inside(X), plain(X)) < 1e-6
    assert wrapper.inside.norm.forward.calls == 1
    assert "toy: norms are fused" in upcast.report(wrapper)
    upcast.unpatch(wrapper)
    assert not any("forward" in vars(module) for module in wrapper.inside.modules())
    with pytest.raises(upcast.UpcastError, match="nothing inside"):
        upcast.patch(ToyWrapper(None))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_fused_forwards_of_its_own(copied: Any) -> None:
    model = upcast.patch(ToyModel().eval())
    other = copied(model)
    assert in_effect(other.norm).module is other.norm
    assert torch.equal(other(X), model(X))
    upcast.unpatch(other)
    assert isinstance(in_effect(model.norm), FusedNorm)
    assert "forward" not in vars(other.norm)


def test_a_policy_and_a_guard_stand_above_it_and_go_in_any_order() -> None:
    model = upcast.patch(ToyModel().eval(), guard=True)
    upcast.diagnose(model, X)  # a policy for its time, between the guard and what is fused
    assert [type(each).__name__ for each in stack(model.norm)] == ["FusedNorm"]
    assert [each.owner for each in stack(model)] == ["guard"]
    norm = model.norm
    push(norm, FusedNorm(norm))
    norm.forward.owner = "another"  # of this instance
    remove(norm, "toy")
    assert [each.owner for each in stack(norm)] == ["another"]
    remove(norm, "another")
    assert "forward" not in vars(norm)


def test_a_forward_of_the_users_stands_where_it_was() -> None:
    model = ToyModel().eval()
    model.down.forward = lambda x: nn.Linear.forward(model.down, x) * 2  # type: ignore[method-assign]
    mine = model.down.forward
    want = rounded(model)(X)
    with upcast.patched(model, policy="sensitive"):
        assert [type(each).__name__ for each in stack(model.down)][:1] == ["Tracked"]
        assert relative_error(model(X), want) < 1e-2
    assert model.down.forward is mine


def test_the_guard_puts_back_what_a_step_changes_and_copies_no_more() -> None:
    model, cache = upcast.patch(ToyModel().eval(), guard=True), ToyCache()
    with torch.no_grad():
        model(X, cache)
        rows, total = list(cache.rows), cache.total.clone()
        half_weights(model)["up.weight"].data.fill_(float("inf"))
        with pytest.raises(upcast.UpcastError, match="not finite"):
            model(X, cache)
    assert torch.equal(cache.total, total)
    assert [id(each) for each in cache.rows] == [id(each) for each in rows]
    assert [saved is cache.total for saved, _ in State((cache,), {}, model)._tensors] == [True]


def test_a_fast_way_that_fails_costs_only_itself(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.installs = False
    model = ToyModel().eval()
    plain = rounded(model)
    upcast.patch(model)
    assert relative_error(model(X), plain(X)) < 1e-6
    assert "forward" not in vars(model.norm)
    assert "without its fast ways for toy: RuntimeError: planted" in capsys.readouterr().err
    assert_patched(model)


def test_one_that_is_expected_comes_with_its_library(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_library.py").touch()
    (tmp_path / "toy_late.py").write_text(
        "from upcast.core.extensions import Extension, register\n"
        "class Late(Extension):\n    name = 'late'\n    def remarks(self, root): return ['late']\n"
        "register(Late())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    extensions.expect("toy_library", "toy_late")
    assert "late" not in upcast.plan(ToyModel()).remarks
    assert "toy_late" not in sys.modules
    importlib.import_module("toy_library")
    assert [upcast.plan(ToyModel()).remarks.count("late") for _ in range(2)] == [1, 1]


def test_the_core_imports_no_library(python: Run) -> None:
    code = f"""
import sys, torch, upcast
model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval(), guard=True)
model(torch.ones(1, 3))
upcast.diagnose(model, torch.ones(1, 3))
upcast.unpatch(model)
dear = [f"upcast.integrations.{{name}}.install" for name in ("litgpt", "transformers")]
dear += ["torch.utils.flop_counter"]  # brings triton where it is installed, and with it the GIL
print([name for name in [*{LIBRARIES}, *dear] if name in sys.modules])
"""
    result = python("-c", code)
    assert result.stdout.strip() == "[]", result.stderr

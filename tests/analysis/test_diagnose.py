"""diagnose: the first operation that breaks float16 is named, and nothing is left behind."""

import copy
import json
import math
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import upcast
from tests.conftest import assert_patched
from tests.models import IDS as NET_IDS
from tests.models import Net, snapshot
from tests.planted import IDS, plant
from tests.transformers_models import FAMILIES, make
from upcast import UpcastError
from upcast.analysis import range_observer
from upcast.policy.policy import CLASSES
from upcast.tensor.half_weight import HalfWeight

FAST = range(12)
ALL_FAULTS = range(100)


def named(seeds: range) -> list[int]:
    """Return the seeds of the planted faults whose class and module are not the ones named."""
    wrong = []
    for seed in seeds:
        fault = plant(seed)
        culprit = upcast.diagnose(fault.model, IDS).culprit
        if culprit is None or (culprit.module, culprit.op_class) != (fault.module, fault.op_class):
            wrong.append(seed)
    return wrong


def test_planted_faults_are_named() -> None:
    assert {plant(seed).op_class for seed in FAST} == set(CLASSES)
    assert named(FAST) == []


@pytest.mark.slow
def test_98_of_100_planted_faults_are_named() -> None:
    assert len(named(ALL_FAULTS)) <= 2


@pytest.mark.parametrize("state", ["float32", "float16", "safe", "sensitive"])
def test_every_state_of_a_model_gives_the_same_culprit_and_is_left_as_it_was(state: str) -> None:
    fault = plant(0)
    model = fault.model.half() if state == "float16" else fault.model
    if state in ("safe", "sensitive"):
        upcast.patch(model, policy=state)
    before, tensors = snapshot(model), dict(model.named_parameters())
    found = upcast.diagnose(model, IDS)
    assert found.culprit is not None
    assert found.culprit.module == fault.module
    assert not found.finite
    assert found.passes == 2
    after = snapshot(model)
    assert {name: set(d) for name, (_, d) in after.items()} == {name: set(d) for name, (_, d) in before.items()}
    assert all(p is tensors[name] for name, p in model.named_parameters())
    if state in ("safe", "sensitive"):
        assert_patched(model)
        assert str(upcast.patching.engine.record_of(model).policy) == state
    else:
        assert not any(isinstance(p, HalfWeight) for p in model.parameters())


class Block(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.gain


def test_the_suggested_policy_is_enough_and_the_report_says_it_all(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), Block(1.0), Block(1.0), nn.LayerNorm(16))
    with torch.no_grad():
        model[1].down.weight.mul_(3e5)
    x = torch.randn(4, 16)
    found = upcast.diagnose(model, x)
    assert found.culprit is not None
    assert (found.culprit.module, found.culprit.op_class) == ("1.down", "linear")
    text = str(found)
    assert f"culprit: 1.down: linear output {found.culprit.largest:,.0f} > 65,504" in text
    assert "suggested policy: linear+norm+residual" in text
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
        got = upcast.patch(copy.deepcopy(model), policy=found.policy)(x)
    assert bool(got.isfinite().all())
    assert float((got - want).norm() / want.norm()) < 2e-2
    content = json.loads(found.to_json(tmp_path / "d.json"))
    assert json.loads((tmp_path / "d.json").read_text()) == content
    assert content["culprit"]["module"] == "1.down"
    assert {site["op_class"] for site in content["sites"]} >= {"linear", "norm", "residual", "activation"}
    pytest.importorskip("matplotlib")
    assert found.plot(tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_ranges_headroom_and_flushing_are_what_the_numbers_say() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return (y + torch.cat([y[:, :4], torch.zeros_like(y[:, 4:])], 1)) * 1e-9

    x = torch.tensor([[1024.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    sites = {(s.op_class, s.function): s for s in upcast.diagnose(Sizes(), x).sites}
    assert sites["linear", "matmul"].largest == 1024
    assert sites["linear", "matmul"].headroom == pytest.approx(math.log2(65504 / 1024))
    assert sites["residual", "add"].largest == 2048
    assert sites[None, "mul"].flushed == 7 / 8


def test_more_results_than_rows_were_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = plant(3)
    wanted = upcast.diagnose(fault.model, IDS).to_json()
    monkeypatch.setattr(range_observer, "ROWS", 2)
    assert upcast.diagnose(fault.model, [IDS, IDS]).sites  # rows are used again by the second sample
    assert upcast.diagnose(fault.model, IDS).to_json() == wanted


def test_scores_inside_a_fused_attention_are_seen() -> None:
    model = make(*next(row for row in FAMILIES if row[0] == "LlamaForCausalLM")[:3])
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(1000)
    sites = upcast.diagnose(model, {"input_ids": IDS}).sites
    fused = [s for s in sites if s.function == "scaled_dot_product_attention"]
    assert len(fused) == 2
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    again = upcast.diagnose(model, {"input_ids": IDS}).sites
    louder = next(s for s in again if (s.module, s.function) == (fused[0].module, fused[0].function))
    assert louder.largest == pytest.approx(2 * fused[0].largest, rel=1e-2)


def test_what_drifts_is_named_too() -> None:
    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x) + 1000.0
            return (y + torch.sin(y).abs()) - (y + 0.01 * y.cos())

    found = upcast.diagnose(Cancels(), torch.randn(4, 64), tolerance=0.05)
    assert found.finite
    assert found.culprit is not None
    assert not found.culprit.overflows
    assert "differs from float32's by" in str(found.culprit)


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in FAMILIES])
def test_inputs_of_every_kind(row: Any) -> None:
    kind, config, sizes, inputs = row
    model = make(kind, config, sizes)
    by_mapping = upcast.diagnose(model, inputs)
    by_kwargs = upcast.diagnose(model, **inputs)
    assert by_mapping.finite
    assert by_mapping.culprit is None
    assert by_mapping.error < 2e-2
    assert by_mapping.to_json() == by_kwargs.to_json()
    assert upcast.diagnose(model, [inputs, inputs]).passes == 4


def test_tuples_and_keyword_arguments_are_samples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
            return self.linear(x) * scale, y

    found = upcast.diagnose(Two(), (torch.ones(1, 4), torch.ones(1, 4)), scale=2.0)
    assert found.finite


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda hidden, logits: {"hidden": hidden, "logits": logits},
    "dict without logits": lambda hidden, logits: {"ids": hidden.argmax(-1), "scores": logits},
    "nested": lambda hidden, logits: {"logits": {"last": logits}, "hidden": (hidden,)},
    "tuple": lambda hidden, logits: (None, logits, hidden),
    "namedtuple": lambda hidden, logits: namedtuple("Output", ["logits", "hidden"])(logits, hidden),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_every_kind(kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Any:
            hidden = self.inner(x)
            return OUTPUTS[kind](hidden, self.head(hidden))

    model = Model()
    assert upcast.diagnose(model, torch.ones(2, 4)).error < 1e-2
    with torch.no_grad():  # the answer, and it alone, is what overflows
        model.head.weight.fill_(4e4)
        model.inner.weight.fill_(1.0)
    found = upcast.diagnose(model, torch.ones(2, 4))
    assert not found.finite
    assert found.culprit is not None
    assert found.culprit.module == "head"


def test_an_optimizer_made_earlier_is_in_nobody_s_way() -> None:
    """Trials put every parameter back before it could step; patch itself still refuses."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    assert upcast.diagnose(model, NET_IDS).finite
    assert upcast.search(model, NET_IDS, tolerance=0.1).policy is not None
    assert upcast.ablate(model, NET_IDS).rows
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    weight = model.up.weight.detach().clone()
    model(NET_IDS).sum().backward()
    optimizer.step()
    assert not torch.equal(model.up.weight, weight)
    with pytest.raises(UpcastError, match="AdamW optimizer holds it"):
        upcast.patch(model)


@pytest.mark.parametrize("name", ["linear", "bias", "matmul", "bmm", "addmm"])
def test_products_of_the_diagnosing_pass_are_float16_s_to_the_last_rounding(name: str) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.offset = nn.Parameter(torch.randn(48, 96) / 8), nn.Parameter(torch.randn(48))

        def forward(self, x: Tensor) -> Tensor:
            if name == "bmm":
                return torch.bmm(x[None], x.t()[None])[0]
            if name == "matmul":
                return x @ self.weight.t()
            if name == "addmm":
                return torch.addmm(self.offset, x, self.weight.t())
            return torch.nn.functional.linear(x, self.weight, self.offset if name == "bias" else None)

    x = torch.randn(40, 96)
    x[0] *= 2e4  # some sums end beyond 65504
    model = upcast.patch(Product(), policy="none")
    seen: list[Tensor] = []
    selection = upcast.patching.engine.record_of(model).selection
    with torch.no_grad():
        want = model(x)
        selection.observer = lambda session, op_class, function, tensors, result: seen.append(result)
        got = model(x)
    assert got is seen[-1]
    assert got.dtype == want.dtype == torch.float16
    assert bool(want.isinf().any())
    assert torch.equal(got.isfinite(), want.isfinite())
    both = want.isfinite()
    assert float((got[both].float() - want[both].float()).abs().max() / want[both].float().abs().max()) < 2**-10
    assert float((got[both] != want[both]).float().mean()) < 0.02


class Alive(TorchDispatchMode):
    """Counts the bytes of new tensors: how many are alive at once, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if type(result) is Tensor and not func.is_view:
            self.now, self.all = self.now + result.nbytes, self.all + result.nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(result, self._gone, result.nbytes)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def test_activations_are_never_held_all_at_once() -> None:
    model, x = nn.Sequential(*(Block(1.0) for _ in range(16))), torch.randn(8192, 16)
    with Alive() as plain, torch.no_grad():
        model(x)
    with Alive() as diagnosing:
        assert upcast.diagnose(model, x).finite
    assert plain.all > 16 * x.nbytes
    assert diagnosing.all > 2 * plain.all  # both passes were seen
    assert diagnosing.peak < 3 * plain.peak
    assert diagnosing.peak < diagnosing.all / 10


def test_a_mask_is_no_large_number() -> None:
    """T5 adds the lowest float32 number to the scores that it hides; plain float16 makes its own lowest of it."""
    kind, config, sizes, inputs = next(row for row in FAMILIES if row[0].startswith("T5"))
    found = upcast.diagnose(make(kind, config, sizes), inputs)
    assert found.finite
    assert found.worst(1)[0].headroom > 0
    assert str(found.policy) == "none"

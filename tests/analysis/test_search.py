"""search and ablate: policies that are enough, and no larger than they have to be."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import upcast
from tests.models import Net
from tests.planted import IDS, plant
from upcast import UpcastError
from upcast.analysis.diagnose import relative_error
from upcast.analysis.runner import NONE, SAFE, PolicyRunner, Samples, answer, trial
from upcast.policy.policy import CLASSES, Policy

FAST = range(12)
TOLERANCE = 1e-2


def enough(run: PolicyRunner, policy: Policy) -> bool:
    (sample,) = Samples([IDS], {})
    want = answer(run.run(SAFE, sample)).float().clone()
    got = answer(run.run(policy, sample)).float()
    return bool(got.isfinite().all()) and relative_error(got, want) <= TOLERANCE


def weaker(policy: Policy) -> list[Policy]:
    """Return the policy without each of its members."""
    classes = policy.overrides[0][1] if policy.overrides else policy.classes
    return [
        Policy(policy.classes - {each}, tuple((pattern, inside - {each}) for pattern, inside in policy.overrides))
        for each in classes
    ]


def scores(seeds: range) -> tuple[int, int, float]:
    """Return (insufficient, not minimal, mean passes) over planted faults."""
    insufficient, larger, passes = 0, 0, 0
    for seed in seeds:
        fault = plant(seed)
        found = upcast.search(fault.model, IDS, tolerance=TOLERANCE, verbose=False)
        passes += found.passes
        with trial(fault.model) as run:
            assert not enough(run, NONE)
            insufficient += not enough(run, found.policy)
            larger += any(enough(run, policy) for policy in weaker(found.policy))
    return insufficient, larger, passes / len(seeds)


def test_search_is_sufficient_and_minimal_on_planted_faults() -> None:
    insufficient, larger, passes = scores(FAST)
    assert (insufficient, larger) == (0, 0)
    assert passes <= 40


@pytest.mark.slow
def test_search_on_100_planted_faults() -> None:
    insufficient, larger, passes = scores(range(100))
    assert insufficient == 0
    assert larger <= 5
    assert passes <= 40


def test_the_result_is_a_policy_with_evidence_that_patch_takes(tmp_path: Path, capsys: Any) -> None:
    fault = plant(4)
    found = upcast.search(fault.model, [IDS, IDS.flip(1)])
    assert found.samples == 2
    assert fault.op_class in found.steps[1].policy
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("upcast: search: ") for line in lines) == len(found.steps)
    assert f"policy {found.policy}: error" in str(found)
    found.to_json(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["policy"] == str(found.policy)
    assert len(content["steps"]) == len(found.steps)
    with pytest.raises(UpcastError, match="measured on a"):
        upcast.patch(Net(), policy=tmp_path / "p.json")
    for choice in (found, tmp_path / "p.json"):
        with upcast.patched(fault.model, policy=choice) as model:
            assert upcast.patching.engine.record_of(model).policy == found.policy
            assert bool(model(IDS)[0].isfinite().all())


def test_a_model_that_needs_nothing_gets_none() -> None:
    found = upcast.search(Net(), torch.arange(14).view(2, 7), verbose=False)
    assert found.policy == NONE
    assert found.passes == 2


def test_a_metric_of_the_user_decides() -> None:
    calls = []

    def metric(got: Any, want: Any) -> float:
        calls.append(got)
        return float((got.float() - want.float()).abs().max())

    net, ids = Net(), torch.arange(14).view(2, 7)
    strict = upcast.search(net, ids, tolerance=1e-7, metric=metric, verbose=False)
    assert str(strict.policy) == "linear+norm+residual+activation"  # all that there is in it
    assert len(calls) == strict.passes - 1
    loose = upcast.search(net, ids, tolerance=1.0, metric=metric, verbose=False)
    assert loose.policy == NONE


class Stream:
    """Samples made as they are asked for, which counts how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.peak = count, 0
        self.made: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count):
            yield self._fresh(index)

    def _fresh(self, index: int) -> Tensor:
        sample = (torch.arange(14).view(2, 7) + index) % 14
        self.made.append(weakref.ref(sample))
        self.peak = max(self.peak, sum(each() is not None for each in self.made))
        return sample


@pytest.mark.parametrize("policies", ["search", "search by metric", "ablate"])
def test_samples_are_streamed_one_alive_at_a_time(policies: str) -> None:
    stream = Stream(4)
    if policies == "ablate":
        upcast.ablate(Net(), stream)
        assert len(stream.made) == 4
    else:
        metric = None if policies == "search" else lambda got, want: float((got - want).abs().max() > 0.5)
        found = upcast.search(Net(), stream, metric=metric, verbose=False)
        assert found.samples == 4
        assert len(stream.made) == 1 + 4  # the first alone, then all under a policy that is enough
        assert found.passes == 4 + 4  # each sample in float32 and under that policy
    assert stream.peak == 1


def test_the_worst_sample_decides_wherever_it_comes() -> None:
    mild = Chain()
    assert upcast.search(mild, [torch.full((1, 8), 1.0)], verbose=False).policy == NONE
    found = upcast.search(mild, [torch.full((1, 8), 1.0), torch.full((1, 8), 10.0)], verbose=False)
    assert "linear" in str(found.policy)
    assert found.samples == 2


class Numbers(Dataset[Any]):
    """A map-style dataset: no __iter__, and no IndexError at its end either."""

    def __getitem__(self, index: int) -> tuple[Tensor]:
        return (torch.arange(14).view(2, 7) + index % 2,)

    def __len__(self) -> int:
        return 3


SOURCES = [Numbers(), DataLoader(Numbers(), batch_size=None), TensorDataset(torch.arange(21).view(3, 1, 7) % 14)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_datasets_and_loaders_are_samples(source: Any) -> None:
    assert upcast.search(Net(), source, verbose=False).samples == 3


ONCE = [
    (lambda: (IDS for _ in range(2)), "inputs is a generator, which gives its samples only once"),
    (lambda: map(abs, [IDS]), r"inputs is a map, .* Pass a list, a Dataset or a DataLoader, or list\(inputs\)"),
    (lambda: DataLoader(Numbers(), shuffle=True), r"a DataLoader that shuffles; .* Make it with shuffle=False"),
]


@pytest.mark.parametrize(("inputs", "message"), ONCE, ids=["generator", "map", "shuffled"])
def test_inputs_that_do_not_come_again_the_same_are_refused(inputs: Any, message: str) -> None:
    for measure in (upcast.search, upcast.ablate):
        with pytest.raises(UpcastError, match=message):
            measure(Net(), inputs())


def test_an_impossible_tolerance_is_refused() -> None:
    def never(got: Any, want: Any) -> float:
        return 1.0

    with pytest.raises(UpcastError, match=r"every class upcast gives an error of 1\.0e\+00"):
        upcast.search(Net(), torch.arange(14).view(2, 7), metric=never, verbose=False)


def test_ablation_has_every_class_alone_and_dropped(tmp_path: Path) -> None:
    fault = plant(10)
    assert fault.op_class == "residual"
    result = upcast.ablate(fault.model, IDS, extra=("norm+residual",))
    rows = {row.label: row for row in result.rows}
    assert {f"{name} alone" for name in CLASSES} | {f"all but {name}" for name in CLASSES} < set(rows)
    for name in CLASSES:
        assert rows[f"{name} alone"].finite is (name == "residual")
        assert rows[f"all but {name}"].finite is (name != "residual")
    assert rows["norm+residual"].finite
    assert not rows["nothing (none)"].finite
    assert rows["everything (safe)"].error == 0
    assert "| all but residual | NO |  |" in result.to_markdown()
    assert len(json.loads(result.to_json(tmp_path / "a.json"))["rows"]) == len(rows)
    pytest.importorskip("matplotlib")
    assert result.plot(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_results_stay_as_they_are() -> None:
    found = upcast.search(Net(), torch.arange(14).view(2, 7), verbose=False)
    with pytest.raises(AttributeError):
        found.error = 0.0  # type: ignore[misc]
    assert replace(found, error=1.0).error == 1.0


class Chain(nn.Module):
    """Eight blocks, of which the fourth overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(8))
        with torch.no_grad():
            for block in self.blocks:
                block.weight.copy_(torch.eye(8))
            self.blocks[3].weight.mul_(1e4)
            self.blocks[4].weight.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_policy_is_confined_to_the_blocks_that_need_it() -> None:
    found = upcast.search(Chain(), torch.full((1, 8), 10.0) + torch.rand(1, 8), verbose=False)
    assert str(found.policy) == "none; blocks.3..4=linear"
    assert upcast.search(Chain(), torch.full((1, 8), 10.0), modules=False, verbose=False).policy.overrides == ()


def test_blocks_are_the_model_s_and_not_an_inner_list_of_experts() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
            with torch.no_grad():
                for expert in self.experts:
                    expert.weight.copy_(torch.eye(8))

        def forward(self, x: Tensor) -> Tensor:
            return sum(expert(x) for expert in self.experts) / 5

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Experts() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first, loud, last = self.layers
            return last(loud(first(x)) * 1e-4)

    model = Mixture()
    with torch.no_grad():
        for expert in model.layers[1].experts:
            expert.weight.mul_(1e4)
    found = upcast.search(model, torch.full((1, 8), 10.0) + torch.rand(1, 8), verbose=False)
    assert found.policy.overrides
    assert {pattern.rpartition(".")[0] for pattern, _ in found.policy.overrides} == {"layers"}

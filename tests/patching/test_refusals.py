"""Bad input: one clear error with what was found, the rule and the remedy, and nothing changed."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import Run, half_weights
from tests.models import Net, snapshot
from upcast.patching import discovery
from upcast.tensor.half_weight import HalfWeight


def _in_an_optimizer() -> nn.Module:
    model = Net()
    model.optimizer_of_the_test = torch.optim.SGD(model.parameters(), lr=0.1)
    return model


def _partly_meta() -> nn.Module:
    model = Net()
    model.down = nn.Linear(65, 32, bias=False, device="meta")
    return model


def _with_patched_part() -> nn.Module:
    model = Net()
    upcast.patch(model.up)
    return model


# name, what is handed over, what the error says
REFUSED: list[tuple[str, Callable[[], object], str]] = [
    (
        "not a module",
        lambda: {"weight": 1},
        r"this dict is no model; upcast patches a torch\.nn\.Module.*Pass the module",
    ),
    ("none", lambda: None, r"this NoneType is no model; upcast patches a torch\.nn\.Module"),
    ("on the meta device", _partly_meta, r"down\.weight of Net is on the meta device.*Load the weights first"),
    (
        "not yet initialised",
        lambda: nn.LazyLinear(3).eval(),
        r"weight of LazyLinear has no shape yet; run one forward pass",
    ),
    ("held by an optimizer", _in_an_optimizer, r"requires grad and a SGD optimizer holds it.*Delete the optimizer"),
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(f, m, id=n) for n, f, m in REFUSED])
def test_refused_by_patch_plan_and_patched(make: Callable[[], object], message: str) -> None:
    model = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.patch(model)
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.plan(model)
    with pytest.raises(upcast.UpcastError, match=message), upcast.patched(model):
        pass
    assert before is None or snapshot(model) == before


PATCHED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("patched already", lambda: upcast.patch(Net()), r"Net is patched already.*upcast\.unpatch\(model\) first"),
    ("a part is patched", _with_patched_part, r"Net is patched already \(up\.weight"),
]


@pytest.mark.parametrize(("make", "message"), [pytest.param(f, m, id=n) for n, f, m in PATCHED])
def test_what_is_patched_is_not_patched_again(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.patch(model)
    with pytest.raises(upcast.UpcastError, match=message), upcast.patched(model):
        pass
    assert "convert" in str(upcast.plan(model))  # what was planned for it, or for its part
    assert snapshot(model) == before


def test_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no accelerator here: a parameter that says it is on one stands in for it."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda:0")

    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.zeros(3, 3).as_subclass(Elsewhere))
    with pytest.raises(upcast.UpcastError, match=r"weight of Linear is on cuda:0.*Call model\.to\('cpu'\) first"):
        upcast.patch(model)


@pytest.mark.parametrize("pattern", ["nope", "up.weights", "h.*"])
def test_a_pattern_that_matches_nothing(pattern: str) -> None:
    model = Net()
    with pytest.raises(upcast.UpcastError, match="matches no parameter of Net; a pattern names"):
        upcast.patch(model, keep=[pattern])
    assert not half_weights(model)


def test_an_unknown_policy_lists_the_valid_ones() -> None:
    model = Net()
    with pytest.raises(upcast.UpcastError, match="policy 'brave': 'brave' is no op class"):
        upcast.patch(model, policy="brave")
    assert not half_weights(model)


def test_unpatching_what_is_not_patched() -> None:
    model = Net()
    with pytest.raises(upcast.UpcastError, match=r"this Net is not patched by upcast.*Call upcast\.patch\(model\)"):
        upcast.unpatch(model)
    upcast.patch(model.up)
    upcast.unpatch(model)  # its patched part
    assert not half_weights(model)


def test_sparse_and_quantized_weights_are_left_alone_and_reported() -> None:
    model = Net()
    model.sparse = nn.Parameter(torch.eye(7).to_sparse(), requires_grad=False)
    model.codes = nn.Parameter(torch.ones(7, 33, dtype=torch.int8), requires_grad=False)
    model.tiny = nn.Parameter(torch.ones(7, 33).to(torch.float8_e4m3fn), requires_grad=False)
    upcast.patch(model)
    reasons = {change.name: change.reason for change in upcast.patching.engine.record_of(model).plan.changes}
    assert reasons["sparse"] == "sparse_coo layout"
    assert reasons["codes"] == "stored as int8"
    assert reasons["tiny"] == "stored as float8_e4m3fn"
    assert model.codes.dtype == torch.int8
    assert isinstance(model.up.weight, HalfWeight)


def test_an_optimizer_of_other_parameters_does_not_matter() -> None:
    optimizer = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    upcast.patch(Net())
    assert optimizer.param_groups


def test_objects_are_searched_only_where_a_parameter_is_held_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meeting every object of the process takes a tenth of a second and more: most models are patched without."""
    tied = Net()
    tied.also = tied.up
    tied.again = tied.up.weight
    tied.shallow = copy.copy(tied.down)  # the same dictionary of parameters: one reference, in two places
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
    found = [slot for slot in discovery.refs(tied) if slot.is_parameter]
    assert len(discovery._held_elsewhere(found)) == len(found) > 0
    del optimizer, found
    held = Net()
    kept = held.up.weight
    assert [slot.name for slot in discovery._held_elsewhere(discovery.refs(held))] == ["up.weight"], kept.shape
    monkeypatch.setattr("gc.get_objects", lambda: pytest.fail("every object was met"))
    for model in (Net(), tied):
        upcast.patch(model)


def test_an_llm_without_a_model() -> None:
    litgpt = pytest.importorskip("litgpt")
    with pytest.raises(upcast.UpcastError, match=r"loaded with distribute=None. Call llm\.distribute\(\) first"):
        upcast.patch(litgpt.LLM(model=None))


SILENT: dict[str, str] = {
    "closed": "sys.stderr.close()",
    "none": "sys.stderr = None",
    "closed descriptor": "os.close(2)",
    "read only": "sys.stderr = open(os.devnull)",
}


@pytest.mark.parametrize("stderr", SILENT)
def test_without_a_standard_error_everything_is_done_all_the_same(python_with_libraries: Run, stderr: str) -> None:
    program = f"""
import os, sys, torch, upcast
model = torch.nn.Linear(9, 7)
{SILENT[stderr]}
upcast.patch(model)
print(type(model.weight).__name__, len(upcast.report(model)) > 50)
model.weight.data_ptr()
print(type(upcast.unpatch(model).weight).__name__)
"""
    result = python_with_libraries("-c", program)
    assert result.stdout.split() == ["HalfWeight", "True", "Parameter"], result.stderr

"""patch, unpatch, patched: what they change, what they leave, and that they leave no trace."""

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import address, assert_patched, fallbacks, half_weights, relative_error, rounded
from tests.models import IDS, Net, snapshot
from upcast.patching.plan import KEEP
from upcast.tensor.half_weight import HalfWeight

pytestmark = pytest.mark.usefixtures("each_kernels")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_at_rest_are_float16_and_equal_w_half(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    source = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert upcast.patch(model) is model
    assert_patched(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, HalfWeight):
            assert torch.equal(parameter.stored, source[name].half())
        else:
            assert torch.equal(parameter, source[name].float())
            assert parameter.dtype == torch.float32
    assert model.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_is_float32_math_on_the_rounded_weights(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    want = rounded(model)(IDS)
    upcast.patch(model)
    got = model(IDS)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-6
    assert fallbacks(model).calls == {}


def test_activations_between_modules_are_float32() -> None:
    model = upcast.patch(Net().half())
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: seen.extend(t.dtype for t in (*args, out)))
    model(IDS)
    assert len(seen) > 10
    assert {dtype for dtype in seen if dtype.is_floating_point} == {torch.float32}


def test_float16_weights_are_never_copied() -> None:
    model = Net().half()
    pointers = {name: address(p) for name, p in model.named_parameters() if p.dim() >= 2}
    upcast.patch(model)
    assert {name: weight.stored.data_ptr() for name, weight in half_weights(model).items()} == pointers
    upcast.unpatch(model)
    assert {name: address(p) for name, p in model.named_parameters() if p.dim() >= 2} == pointers


def test_nothing_changes_a_parameter_during_forward() -> None:
    model = upcast.patch(Net())
    before = {name: (id(p), address(p)) for name, p in model.named_parameters()}
    numbers = {name: weight.stored.clone() for name, weight in half_weights(model).items()}
    want = [model(IDS), model(IDS.flip(0))]
    failures: list[object] = []

    def work(index: int) -> None:
        for _ in range(20):
            got = model([IDS, IDS.flip(0)][index])
            if relative_error(got, want[index]) > 1e-6:
                failures.append(got)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {name: (id(p), address(p)) for name, p in model.named_parameters()} == before
    assert all(torch.equal(w.stored, numbers[name]) for name, w in half_weights(model).items())


def test_linear_layers_take_the_short_way_and_still_have_the_long_one() -> None:
    layer = upcast.patch(nn.Linear(33, 31).eval())
    x, seen = torch.randn(2, 33), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(layer.forward(input=x), want)
        other = copy.deepcopy(layer)
        assert other.forward.module is other
        other.weight.zero_()
        assert torch.equal(layer(x), want)
        assert torch.equal(other(x), layer.bias.expand(2, 31))
        layer.weight = nn.Parameter(torch.zeros(31, 33))  # replaced by the user
        assert torch.equal(layer(x), layer.bias.expand(2, 31))
    assert len(seen) == 4  # the copy has the hook too
    assert list(inspect.signature(layer.forward).parameters) == ["input"]


def test_another_forward_of_an_instance_is_left_alone() -> None:
    layer = nn.Linear(33, 31).eval()
    layer.forward = lambda x: x
    assert torch.equal(upcast.unpatch(upcast.patch(layer))(torch.ones(3)), torch.ones(3))
    assert "forward" in layer.__dict__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_then_unpatch_leaves_no_trace(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    model.embed.weight.flavour = "sweet"
    before, names = snapshot(model), dict(model.named_parameters())
    assert upcast.unpatch(upcast.patch(model)) is model
    after = snapshot(model)
    for name, (kind, attributes) in before.items():
        assert after[name][0] is kind
        assert after[name][1].keys() == attributes.keys()
        for key in attributes:
            if key not in ("_parameters", "_buffers", "_modules"):
                assert after[name][1][key] == attributes[key], (name, key)
    for name, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter
        assert parameter.dtype == dtype
        assert parameter.requires_grad
        assert torch.equal(parameter, (names[name].half().to(dtype) if parameter.dim() >= 2 else names[name]))
    assert model.scale.dtype == dtype
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.flavour == "sweet"


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an exception"])
def test_patched_restores_the_original_tensors(fails: bool) -> None:
    model = Net()
    before, parameters = snapshot(model), dict(model.named_parameters())
    numbers = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with upcast.patched(model) as same:
            assert same is model
            assert_patched(model)
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert snapshot(model) == before
    assert all(p is parameters[name] and torch.equal(p, numbers[name]) for name, p in model.named_parameters())


def test_an_interrupted_patch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before, calls = snapshot(model), []

    def interrupt(*args: object) -> object:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    original = upcast.patching.new_weights.to_half
    monkeypatch.setattr("upcast.patching.new_weights.to_half", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcast.patch(model)
    assert len(calls) == 4
    assert snapshot(model) == before


def test_an_interrupted_unpatch_stays_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = upcast.patch(Net())
    want = model(IDS)
    weights, calls = half_weights(model), []

    def interrupt(*args: object) -> object:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    original = upcast.patching.engine._before
    monkeypatch.setattr("upcast.patching.engine._before", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcast.unpatch(model)
    monkeypatch.undo()
    assert all(weight is weights[name] for name, weight in half_weights(model).items())
    assert relative_error(model(IDS), want) < 1e-6
    upcast.unpatch(model)


def test_tied_weights_stay_tied() -> None:
    model = upcast.patch(Net())
    assert model.head.weight is model.embed.weight
    assert sum(change.name == "embed.weight" for change in upcast.patching.engine.record_of(model).plan.changes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_twins_share_one_storage_until_one_changes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(33, 31), nn.Linear(33, 31), nn.Linear(33, 31)).to(dtype).eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    other = model[1].weight.detach().clone()
    upcast.patch(model)
    first, second, third = (layer.weight for layer in model)
    assert first.stored.data_ptr() == second.stored.data_ptr() != third.stored.data_ptr()
    first.zero_()
    assert torch.equal(second.stored, other.half())
    assert first.stored.count_nonzero() == 0


def test_unpatched_twins_are_separate_again() -> None:
    model = nn.Sequential(nn.Linear(33, 31), nn.Linear(33, 31)).half().eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    upcast.unpatch(upcast.patch(model))
    assert torch.equal(model[0].weight, model[1].weight)
    assert address(model[0].weight) != address(model[1].weight)


@pytest.mark.parametrize("value", [65505.0, 1e6, float("inf"), float("nan")], ids=str)
def test_a_weight_that_float16_cannot_hold_stays_in_float32(value: float) -> None:
    model = Net()
    with torch.no_grad():
        model.down.weight[3, 4] = value
    want = model.down.weight.detach().clone()
    upcast.patch(model)
    assert type(model.down.weight) is nn.Parameter
    assert torch.equal(model.down.weight.nan_to_num(1), want.nan_to_num(1))
    (change,) = (c for c in upcast.patching.engine.record_of(model).plan.changes if c.name == "down.weight")
    assert change.action == KEEP
    assert change.reason == ("1 values beyond 65504" if value in (65505.0, 1e6) else "1 values not finite")
    assert isinstance(model.up.weight, HalfWeight)


def test_65504_and_subnormals_are_stored() -> None:
    model = nn.Linear(3, 1).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[65504.0, -65504.0, 2.0**-24]]))
    upcast.patch(model)
    assert torch.equal(model.weight.upcast(), torch.tensor([[65504.0, -65504.0, 2.0**-24]]))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["head"], ["embed.weight"]),
        (["up.weight", "down"], ["up.weight", "down.weight"]),
        (["*own*"], ["down.weight"]),
        (["*"], ["embed.weight", "conv.weight", "up.weight", "down.weight"]),
    ],
    ids=str,
)
def test_patterns_choose_what_stays_in_float32(keep: list[str], left: list[str]) -> None:
    model = Net().half()
    if keep == ["head"]:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
        left = ["head.weight"]
    upcast.patch(model, keep=keep)
    wide = {name for name, p in model.named_parameters() if p.dim() >= 2 and not isinstance(p, HalfWeight)}
    assert wide == set(left)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model(IDS)


def test_a_pipeline_s_model_is_patched_in_place() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.model = Net()

    pipeline = Pipeline()
    assert upcast.patch(pipeline) is pipeline
    assert_patched(pipeline.model)
    upcast.unpatch(pipeline)
    assert not half_weights(pipeline.model)


def test_a_fabric_module_is_patched_inside() -> None:
    lightning = pytest.importorskip("lightning")
    model = Net()
    want = rounded(model)(IDS)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    wrapped = upcast.patch(fabric.setup_module(model))
    assert_patched(model)
    assert relative_error(wrapped(IDS), want) < 1e-6


def test_other_models_are_untouched() -> None:
    bystander = Net()
    before, want = snapshot(bystander), bystander(IDS)
    upcast.patch(copy.deepcopy(bystander))
    assert snapshot(bystander) == before
    assert torch.equal(bystander(IDS), want)


def test_training_through_a_frozen_model() -> None:
    model = upcast.patch(Net()).requires_grad_(False)
    adapter = nn.Linear(129, 1)
    adapter(model(IDS)).sum().backward()
    assert adapter.weight.grad is not None
    assert all(weight.grad is None for weight in half_weights(model).values())


def test_moving_to_the_cpu_copies_nothing() -> None:
    model = upcast.patch(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8)).eval())
    before = {name: weight.stored.data_ptr() for name, weight in half_weights(model).items()}
    assert model.to("cpu") is model
    model.float()
    assert {name: weight.stored.data_ptr() for name, weight in half_weights(model).items()} == before
    assert fallbacks(model).calls == {}


def test_in_place_scaling_is_rounded_once_or_goes_to_float32(capsys: pytest.CaptureFixture[str]) -> None:
    model = upcast.patch(nn.Linear(33, 7))
    want = (model.weight.upcast() / 4).half()
    with torch.no_grad():
        model.weight.div_(4)
        assert torch.equal(model.weight.stored, want)
        model.weight.mul_(1e9)
    assert torch.equal(model.weight, want.float() * 1e9)
    assert capsys.readouterr().err.count("float32 parameters") == 1
    assert "float32 since then: 1 weights" in upcast.report(model)


def test_of_several_threads_one_patches() -> None:
    """All of them have looked at the model before the first changes it."""
    for _ in range(10):
        model = torch.nn.Sequential(*[torch.nn.Linear(33, 33) for _ in range(20)]).eval()
        plain = rounded(model)
        start, refused = threading.Barrier(6), []

        def work(model: torch.nn.Module = model, start: Any = start, refused: list[str] = refused) -> None:
            start.wait()
            try:
                upcast.patch(model)
            except upcast.UpcastError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 5
        assert all("another thread" in line or "patched already" in line for line in refused), refused
        x = torch.randn(2, 33)
        assert relative_error(model(x), plain(x)) < 1e-6
        assert len(half_weights(model)) == 20
        upcast.unpatch(model)
        assert not half_weights(model)
        assert all("forward" not in vars(module) for module in model.modules())

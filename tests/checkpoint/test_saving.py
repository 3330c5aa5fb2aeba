"""A patched model saves, loads, copies and converts as users expect."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from tests.models import IDS, Net

SOURCES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def model() -> Net:
    return upcast.patch(Net())


def test_state_dict_has_the_same_keys_and_plain_float16_tensors(model: Net) -> None:
    plain = Net()
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    for tensor in state.values():
        assert type(tensor) is Tensor
        assert tensor.dtype == (torch.float16 if tensor.dim() >= 2 else torch.float32)
    assert state["up.weight"].data_ptr() == model.up.weight.stored.data_ptr()
    assert {n: v.dtype for n, v in model.up.state_dict(prefix="x.").items()} == {
        "x.weight": torch.float16,
        "x.bias": torch.float32,
    }


def test_keep_vars_gives_the_parameters_themselves(model: Net) -> None:
    assert model.state_dict(keep_vars=True)["up.weight"] is model.up.weight


def test_an_unpatched_model_loads_it(model: Net) -> None:
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert relative_error(plain(IDS), model(IDS)) < 1e-6
    assert torch.equal(plain.up.weight, model.up.weight.upcast())


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", SOURCES, ids=str)
def test_it_loads_any_floating_dtype(model: Net, dtype: torch.dtype, assign: bool) -> None:
    source = Net().to(dtype)
    state = source.state_dict()
    model.load_state_dict(state, strict=True, assign=assign)
    assert isinstance(model.up.weight, upcast.HalfWeight)
    for name, weight in half_weights(model).items():
        assert torch.equal(weight.stored, state[name].half())
    if assign and dtype == torch.float16:
        assert model.up.weight.stored.data_ptr() == state["up.weight"].data_ptr()
    if dtype == torch.float32:
        assert relative_error(model(IDS), rounded(source)(IDS)) < 1e-6


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_what_float16_cannot_hold(model: Net, assign: bool) -> None:
    state = Net().state_dict()
    state["up.weight"][0, 0] = 1e6
    weight = model.up.weight
    model.load_state_dict(state, assign=assign)
    assert (model.up.weight is weight) is not assign
    assert model.up.weight[0, 0] == 1e6
    assert type(model.up.weight) is nn.Parameter
    assert type(model.down.weight) is upcast.HalfWeight


def test_wrong_shapes_and_keys_are_torch_s_own_errors(model: Net) -> None:
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**state, "up.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in state.items() if k != "up.weight"})


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_whole_models_can_be_copied(model: Net, way: str) -> None:
    want = model(IDS)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert_patched(other)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other(IDS), want)
    with torch.no_grad():
        other.up.weight.zero_()
    assert torch.equal(model(IDS), want)
    assert other.state_dict()["down.weight"].dtype == torch.float16
    upcast.unpatch(other)
    assert torch.equal(model(IDS), want)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(nn.Linear(33, 31), nn.Linear(33, 31)).eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    upcast.patch(model)
    assert model[1].weight.store.half is model[0].weight.store.half
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    assert loaded["0.weight"].dtype == torch.float16
    model.load_state_dict(loaded)


def test_a_loaded_checkpoint_may_tell_twins_apart() -> None:
    model = nn.Sequential(nn.Linear(33, 31, bias=False), nn.Linear(33, 31, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    upcast.patch(model)
    state = {"0.weight": torch.zeros(31, 33), "1.weight": torch.ones(31, 33)}
    model.load_state_dict(state)
    assert model[0].weight.stored.sum() == 0
    assert model[1].weight.stored.sum() == 31 * 33


def test_conversions_that_change_nothing(model: Net) -> None:
    want, weights = model(IDS), half_weights(model)
    for converted in (
        model.to("cpu"),
        model.float(),
        model.to(torch.float32),
        model.cpu(),
        model.train(),
        model.eval(),
    ):
        assert converted is model
    assert all(weight is weights[name] for name, weight in half_weights(model).items())
    assert torch.equal(model(IDS), want)


def test_twins_survive_conversions() -> None:
    model = nn.Sequential(nn.Linear(33, 31), nn.Linear(33, 31)).eval()
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    upcast.patch(model).to("cpu")
    model[0].weight.zero_()
    assert model[1].weight.stored.count_nonzero() > 0


CONVERSIONS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "to(float16)": lambda model: model.to(torch.float16),
    "to(meta)": lambda model: model.to("meta"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_model_is_converted_as_the_program_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = rounded(Net())
    model = upcast.patch(copy.deepcopy(plain))
    capsys.readouterr()
    for each in (plain, model):
        assert CONVERSIONS[name](each) is each
    (said,) = capsys.readouterr().err.splitlines()
    assert "Net is converted to" in said
    for (key, got), (wanted_key, want) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert (key, type(got), got.dtype, got.device) == (wanted_key, type(want), want.dtype, want.device)
        assert want.is_meta or torch.equal(got, want)
    assert type(model.up.weight) is nn.Parameter
    assert not {"_upcast", "_apply", "train"} & model.__dict__.keys()


def test_share_memory(model: Net) -> None:
    want = model(IDS)
    model.requires_grad_(False).share_memory()
    assert model.up.weight.stored.is_shared()
    assert torch.equal(model(IDS), want)


def test_print_and_counting(model: Net) -> None:
    assert "Linear(in_features=32, out_features=65" in str(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in Net().parameters())

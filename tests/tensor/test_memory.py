"""Memory is never described falsely: who asks for a weight's bytes gets float32's, and what is written arrives."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from upcast.tensor.half_weight import HalfWeight

safetensors = pytest.importorskip("safetensors.torch")

Use = Callable[[nn.Module, Path], Any]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 40), nn.Linear(40, 40)).eval()
    model[2].weight.data.copy_(model[1].weight)  # equal, and not tied
    return model.requires_grad_(False)


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def _written_by_numpy(model: nn.Module, _: Path) -> None:
    model[0].weight.data.numpy()[1, 1] = 5


def _written_through_an_array(model: nn.Module, _: Path) -> None:
    np.asarray(model[0].weight.detach())[2] *= 3


def _written_by_dlpack(model: nn.Module, _: Path) -> None:
    torch.from_dlpack(model[0].weight.detach()).mul_(2)


def _written_by_numpy_s_dlpack(model: nn.Module, _: Path) -> None:
    np.from_dlpack(model[0].weight.detach())[0] = 7


def _written_as_bytes(model: nn.Module, _: Path) -> None:
    model[0].weight.view(torch.int32)[3, 3] = 0


def _written_in_storage(model: nn.Module, _: Path) -> None:
    model[0].weight.untyped_storage()[5] = 0


def _written_through_strides(model: nn.Module, _: Path) -> None:
    model[0].weight.as_strided((5,), (1,)).zero_()


def _views_follow(model: nn.Module, _: Path) -> None:
    row, transposed = model[0].weight.data[3], model[0].weight.t()
    model[0].weight.data.numpy()[0] = 1
    row.fill_(2)
    transposed.mul_(3)


def _scaled(factor: float, through: Callable[[nn.Module], Tensor]) -> Use:
    return lambda model, _: through(model).mul_(factor)


def _swapped_after_one_has_moved(model: nn.Module, _: Path) -> None:
    model[1].weight.detach().numpy()[0] = 1
    model[1].weight.data, model[2].weight.data = model[2].weight.data, model[1].weight.data


def _swap(a: Tensor, b: Tensor) -> None:
    a.data.mul_(2)
    a.data, b.data = b.data, a.data


def _through_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())


def _round_trip(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path / "state.pt")
    model[0].weight.data.zero_()
    model.load_state_dict(torch.load(path / "state.pt", weights_only=True))


def _through_save_model(model: nn.Module, path: Path) -> None:
    safetensors.save_model(model, path / "model.safetensors")
    model[0].weight.data.zero_()
    safetensors.load_model(model, path / "model.safetensors")


# name, what is done to a model; afterwards it must give what the unpatched model gives; the values fit float16
WRITES: list[tuple[str, Use]] = [
    ("numpy", _written_by_numpy),
    ("asarray", _written_through_an_array),
    ("DLPack", _written_by_dlpack),
    ("numpy's DLPack", _written_by_numpy_s_dlpack),
    ("view(int32)", _written_as_bytes),
    ("untyped_storage", _written_in_storage),
    ("as_strided", _written_through_strides),
    ("older views", _views_follow),
    (".data", _scaled(0.5, lambda m: m[1].weight.data)),
    ("a view of an equal weight", _scaled(0.5, lambda m: m[2].weight.view(-1)[7:99])),
    ("a transposed equal weight", _scaled(2, lambda m: m[1].weight.detach().t()[:3])),
    ("state_dict, an equal weight", _scaled(0.5, lambda m: m.state_dict()["2.weight"])),
    ("state_dict, the first of equals", _scaled(0.5, lambda m: m.state_dict()["1.weight"])),
    ("state_dict then the weight", lambda m, _: (m.state_dict(), m[1].weight.data.mul_(2))),
    ("keep_vars", _scaled(0.5, lambda m: m.state_dict(keep_vars=True)["2.weight"])),
    ("fill_ of an equal weight", lambda m, _: m[2].weight.data.fill_(0.25)),
    ("copy_ from an equal weight's part", lambda m, _: m[1].weight[:3].copy_(m[2].weight[5:8])),
    ("index_add_", lambda m, _: m[0].weight.index_add_(0, torch.tensor([1, 1]), torch.ones(2, 5))),
    ("masked_fill_", lambda m, _: m[0].weight.masked_fill_(m[0].weight > 0, 0.5)),
    ("setitem by rows", lambda m, _: m[0].weight.__setitem__(torch.tensor([3, 4]), torch.ones(2, 5))),
    ("out=", lambda m, _: torch.add(torch.ones(40, 5), torch.ones(40, 5), out=m[0].weight)),
    ("foreach", lambda m, _: torch._foreach_mul_([p.data for p in m.parameters()], 2.0)),
    (".data of its own double", lambda m, _: setattr(m[0].weight, "data", m[0].weight.data * 2)),
    (".data of zeros", lambda m, _: setattr(m[0].weight, "data", torch.zeros(40, 5))),
    (".data of float16", lambda m, _: setattr(m[1].weight, "data", m[1].weight.data.float().clone())),
    (".data +=", lambda m, _: m[0].weight.data.__iadd__(torch.ones(40, 5))),
    ("a shallow copy", _scaled(0.5, lambda m: copy.copy(m[0].weight))),
    ("a shallow copy of an equal weight's .data", _scaled(0.5, lambda m: copy.copy(m[1].weight.data))),
    ("apply_", lambda m, _: m[0].weight.data.apply_(lambda x: x / 2)),
    ("map_ of a row", lambda m, _: m[1].weight.detach()[3].map_(m[2].weight[4], lambda x, y: x + y)),
    ("swapped", lambda m, _: _swap(m[1].weight, m[2].weight)),
    ("swapped after one has moved", _swapped_after_one_has_moved),
    ("vector_to_parameters", lambda m, _: _through_a_vector(m)),
    ("load_state_dict of what was saved", _round_trip),
    ("load_model", _through_save_model),
]


@pytest.mark.parametrize("use", [pytest.param(use, id=name) for name, use in WRITES])
def test_a_write_arrives_and_changes_nothing_else(use: Use, tmp_path: Path) -> None:
    got, want = upcast.patch(net()), rounded(net())
    assert got[1].weight.store.half is got[2].weight.store.half
    weights, versions = [*got.parameters()], [weight._version for weight in got.parameters()]
    with torch.no_grad():
        before = [weight.clone() for weight in weights]
        for model in (got, want):
            use(model, tmp_path)
        for weight, numbers, version in zip(weights, before, versions, strict=True):
            assert torch.equal(weight, numbers) or weight._version > version or type(weight) is nn.Parameter
        for parameter, wanted in zip(got.parameters(), rounded(want).parameters(), strict=True):
            assert parameter.dtype == torch.float32
            assert relative_error(parameter, wanted) < 3e-4
        if not any(type(p) is nn.Parameter and p.dim() > 1 for p in got.parameters()):
            assert_patched(got)
        assert relative_error(got(X), rounded(want)(X)) < 3e-4


def _loaded(save: Callable[[Any, Path], object], choose: Callable[[nn.Module], dict[str, Tensor]]) -> Use:
    def use(model: nn.Module, folder: Path) -> Any:
        save(choose(model), folder / "file")
        if save is safetensors.save_file:
            return safetensors.load_file(folder / "file")
        return torch.load(folder / "file", weights_only=True)

    return use


CHOICES: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "parameters": lambda m: dict(m.named_parameters()),
    "detached": lambda m: {name: p.detach() for name, p in m.named_parameters()},
    "data": lambda m: {name: p.data for name, p in m.named_parameters()},
    "slices": lambda m: {name: p.detach()[1:3] for name, p in m.named_parameters()},
    "copies": lambda m: {name: p.detach().clone() for name, p in m.named_parameters()},
    "transposed copies": lambda m: {name: p.detach().T.contiguous() for name, p in m.named_parameters() if p.dim() > 1},
}


@pytest.mark.parametrize("choose", [pytest.param(choose, id=name) for name, choose in CHOICES.items()])
@pytest.mark.parametrize("save", [torch.save, safetensors.save_file], ids=["torch.save", "save_file"])
def test_what_is_saved_is_float32(save: Any, choose: Any, tmp_path: Path) -> None:
    got, want = (_loaded(save, choose)(model, tmp_path) for model in (upcast.patch(net()), rounded(net())))
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, want[name]), name


def _attached(weight: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), weight.data.data_ptr(), weight[0].data_ptr(), weight[1].data_ptr() - 20


def test_addresses_tell_what_shares_memory() -> None:
    model = upcast.patch(net())
    assert len(set(_attached(model[0].weight))) == 1
    assert model[1].weight.data_ptr() != model[2].weight.data_ptr()  # equal, and not tied
    model[2].weight = model[1].weight
    assert model[1].weight.data_ptr() == model[2].weight.data_ptr()


def test_sizes_are_those_at_rest() -> None:
    model = upcast.patch(net())
    want = sum(p.nelement() * (2 if p.dim() > 1 else 4) for p in model.parameters())
    assert sum(p.nelement() * p.element_size() for p in model.parameters()) == want
    assert sum(p.nbytes for p in model.parameters()) == want
    accelerate = pytest.importorskip("accelerate.utils")
    assert accelerate.compute_module_sizes(model)[""] == want
    assert_patched(model)  # nobody asked for bytes


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_ordinary_tensor_shares_a_weight_s_memory(mode: Callable[[], Any]) -> None:
    """The setter of data asks only the ordinary tensor; what it took over was read at address zero."""
    for part in (lambda w: w, lambda w: w.data, lambda w: w.detach(), lambda w: w.data[1:3], lambda w: w.data.t()):
        results = []
        for model in (upcast.patch(net()), rounded(net())):
            layer = nn.Linear(5, 40)
            with mode():
                layer.weight.data = part(model[0].weight)
                assert layer.weight.data_ptr() == part(model[0].weight.detach()).data_ptr()
            with torch.no_grad():
                model[0].weight[:, 0].mul_(2)
                if mode is not torch.inference_mode:
                    layer.weight[0].fill_(3)
            results += [layer.weight.detach().clone(), model[0].weight.detach().clone()]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


def test_recurrent_layers_begin_to_train() -> None:
    results = []
    for make in (rounded, upcast.patch):
        torch.manual_seed(0)
        model = make(nn.LSTM(5, 7).eval())
        x = torch.randn(3, 2, 5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
        results.append(model(x)[0].detach())
    assert relative_error(*results) < 1e-5


def test_what_is_shared_by_data_is_shared(capsys: pytest.CaptureFixture[str]) -> None:
    model, values = upcast.patch(net()), torch.randn(40, 5)
    capsys.readouterr()
    for layer, shared in ((model[0], values), (model[1], torch.randn(40, 40))):
        layer.weight.data = shared
        shared.fill_(3)
        assert torch.equal(layer.weight, shared)
    assert capsys.readouterr().err.count("float32 parameters") == 1  # said once
    assert "float32 since then: 2 weights" in upcast.report(model)
    assert len(half_weights(model)) == 1
    assert relative_error(model(X), model[2](model[1](model[0](X)))) < 1e-6
    upcast.unpatch(model)


SHAPES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("another shape", lambda w: torch.randn(7, 5)),
    ("one that broadcasts", lambda w: torch.randn(1, 5)),
    ("fewer dimensions", lambda w: torch.randn(40)),
    ("bfloat16", lambda w: w.data.bfloat16()),
    ("float16", lambda w: w.data.half()),
    ("float64", lambda w: w.data.double()),
]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in SHAPES])
def test_data_of_another_shape_or_dtype_is_taken_as_torch_takes_it(make: Callable[[Tensor], Tensor]) -> None:
    got, want = upcast.patch(net())[0].weight, rounded(net())[0].weight
    for weight in (got, want):
        torch.manual_seed(0)
        weight.data = make(weight)
    assert type(got) is nn.Parameter
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got, want)


PARAMETERS: list[tuple[str, Callable[[Tensor], nn.Parameter]]] = [
    ("the weight", nn.Parameter),
    (".data", lambda w: nn.Parameter(w.data)),
    ("detached", lambda w: nn.Parameter(w.detach())),
    ("a slice", lambda w: nn.Parameter(w.data[:7])),
    ("a clone", lambda w: nn.Parameter(w.data.clone())),
    ("rows", lambda w: nn.Parameter(w[torch.tensor([1, 2])])),
    ("its type", lambda w: type(w)(torch.ones(3, 5), requires_grad=True)),
]


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in PARAMETERS])
def test_a_parameter_made_of_a_weight_learns(make: Callable[[Tensor], nn.Parameter]) -> None:
    """Soft prompts, extended embeddings, copies of heads: what unpatched code gets, it gets."""
    model, plain = upcast.patch(net()), rounded(net())
    results = []
    for weight in (model[0].weight, plain[0].weight):
        parameter = make(weight)
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        optimizer = torch.optim.SGD([parameter], lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            (parameter @ X.T).square().sum().backward()
            optimizer.step()
        results.append((parameter.detach(), weight.detach().clone()))
    (got, shared), (want, wanted) = results
    assert torch.equal(got, want)  # steps far smaller than float16's
    assert torch.equal(shared, wanted)


def test_gates_of_one_element_serve_the_whole_batch() -> None:
    class Gated(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.gamma, self.fc = nn.Parameter(torch.full(shape, 0.3)), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.fc(x) - (x / (2 + self.gamma))

    for shape in ((1, 1, 1), (1, 1), (1, 1, 6), (1, 5, 1), (4, 1, 1), (4, 1, 6)):
        model = Gated(*shape)
        x = torch.randn(4, 5, 6)
        assert relative_error(upcast.patch(copy.deepcopy(model))(x), rounded(model)(x)) < 1e-6, shape


def test_adapters_added_by_hand_keep_their_gradient() -> None:
    for write in (
        lambda w, delta: w.clone().add_(delta),
        lambda w, delta: w.data.add_(delta),
        lambda w, delta: w.detach().clone().index_add(0, torch.arange(40), delta),
        lambda w, delta: w + delta,
    ):
        grads = []
        for model in (upcast.patch(net()), rounded(net())):
            torch.manual_seed(2)
            a, b = torch.randn(2, 5, requires_grad=True), torch.randn(40, 2, requires_grad=True)
            torch.nn.functional.linear(X, write(model[0].weight, b @ a * 1e-6)).square().sum().backward()
            grads.append((a.grad, b.grad, model[0].weight.detach().clone()))
        for got, want in zip(*grads, strict=True):
            assert relative_error(got, want) < 1e-5


def test_merging_in_place_stays_in_float16() -> None:
    model, plain = upcast.patch(net()), rounded(net())
    for each in (model, plain):
        torch.manual_seed(2)
        a, b = torch.randn(2, 5, requires_grad=True), torch.randn(40, 2, requires_grad=True)
        each[0].weight.data += b @ a
    assert_patched(model)
    assert torch.equal(model[0].weight.stored, plain[0].weight.half())


def test_models_pickle_in_float16_with_their_ties() -> None:
    model = net()
    model[2].weight = model[1].weight
    upcast.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert len(buffer.getvalue()) < 2.5 * sum(p.numel() for p in model.parameters()) + 20000
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), nn.Sequential(*copy.deepcopy([*model]))):
        assert_patched(other)
        assert other[2].weight is other[1].weight
        assert torch.equal(other(X), model(X))
    part = pickle.loads(pickle.dumps(model[1]))
    assert isinstance(part.weight, HalfWeight)


STEPS: list[tuple[str, Callable[[Tensor, Tensor], object]]] = [
    ("mul_ and add_", lambda average, new: average.mul_(0.999).add_(new, alpha=0.001)),
    ("lerp_", lambda average, new: average.lerp_(new, 0.001)),
    ("copy_", lambda average, new: average.copy_(0.999 * average + 0.001 * new)),
    (".data =", lambda average, new: setattr(average, "data", 0.999 * average.data + 0.001 * new)),
    ("foreach", lambda average, new: torch._foreach_lerp_([average], [new], 0.001)),
    ("one number", lambda average, new: average[3, 3].add_(1e-6)),
]


@pytest.mark.parametrize("step", [pytest.param(step, id=name) for name, step in STEPS])
def test_small_steps_are_not_lost(step: Callable[[Tensor, Tensor], object]) -> None:
    """An average of weights, or steps by hand: rounding each to float16 would leave the numbers as they were."""
    got, want = upcast.patch(net())[0].weight, rounded(net())[0].weight
    new = torch.randn(40, 5) / 10
    with torch.no_grad():
        for _ in range(20):
            step(got, new)
            step(want, new)
    assert type(got) is nn.Parameter
    assert relative_error(got, want) < 1e-3  # the first few were rounded


def _decayed(average: nn.Module, new: nn.Module) -> None:
    for name, numbers in average.state_dict().items():
        numbers.mul_(0.999)
        numbers.add_(0.001 * new.state_dict()[name])


def _copied(average: nn.Module, new: nn.Module) -> None:
    for numbers, others in zip(average.state_dict().values(), new.state_dict().values(), strict=True):
        numbers.copy_(0.999 * numbers + 0.001 * others)


@pytest.mark.parametrize("step", [_decayed, _copied])
def test_small_steps_through_state_dicts_are_not_lost(step: Callable[[nn.Module, nn.Module], None]) -> None:
    """An average as many training scripts keep it: nobody asks there whether float16 holds a step."""
    got, want, new = upcast.patch(net()), rounded(net()), net()
    nn.init.normal_(new[0].weight)
    for _ in range(40):
        step(got, new)
        step(want, new)
    assert got.state_dict()["0.weight"].dtype == torch.float32
    assert relative_error(got[0].weight, want[0].weight) < 2e-3  # the first few were rounded


def test_state_dicts_that_are_read_or_loaded_leave_weights_in_float16() -> None:
    model = upcast.patch(net())
    for _ in range(9):
        state = model.state_dict()
        model.load_state_dict({name: numbers * 0.5 for name, numbers in state.items()})
    assert_patched(model)


def test_loading_the_same_checkpoint_again_stays_in_float16() -> None:
    plain = net()
    model = upcast.patch(copy.deepcopy(plain))
    model.load_state_dict(plain.state_dict())  # every number would change by less than float16 can tell
    assert_patched(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_whose_weight_became_float32_takes_the_inputs_that_it_took(dtype: torch.dtype) -> None:
    model = upcast.patch(net())
    want = model(X.to(dtype))
    model[1].weight.data.numpy()
    got = model(X.to(dtype))
    assert type(model[1].weight) is nn.Parameter
    assert relative_error(got, want) < 1e-6

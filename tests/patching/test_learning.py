"""What learns and what does not: float32 parameters that stay themselves on a base stored in float16."""

import copy
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import fallbacks, half_weights, relative_error, rounded
from upcast import kernels
from upcast.kernels import portable
from upcast.tensor.half_weight import HalfWeight

LAYERS, WIDTH, STEPS = 6, 64, 20


class Block(nn.Module):
    """A frozen gated MLP under a norm, with a low-rank adapter on its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.lora_a = nn.Parameter(torch.randn(8, WIDTH) / 8)
        self.lora_b = nn.Parameter(torch.randn(WIDTH, 8) / 80)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        wide = torch.nn.functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(wide) + y @ self.lora_a.T @ self.lora_b.T


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in training mode whose adapters, and nothing else, require grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(97, WIDTH), *[Block() for _ in range(LAYERS)], nn.Linear(WIDTH, 97))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    return model.to(dtype)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


IDS = torch.arange(60).view(4, 15) % 97


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def reference(model: nn.Module) -> nn.Module:
    """float32 on the same rounded base; the adapters are not rounded."""
    wanted = rounded(model)
    with torch.no_grad():
        for name, parameter in learning(model).items():
            wanted.get_parameter(name).copy_(parameter)
    return wanted


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# --- which parameters learn -------------------------------------------------------------------------------------------


def test_what_requires_grad_stays_itself_and_the_rest_goes_to_float16() -> None:
    model = adapted()
    before = learning(model)
    upcast.patch(model)
    assert len(half_weights(model)) == 2 + 3 * LAYERS
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in before.values())
    assert "it learns" in str(upcast.report(model))
    assert f"training: {LAYERS * 16 * WIDTH:,} of" in upcast.report(model)


def test_an_optimizer_from_before_goes_on_with_its_state() -> None:
    model = adapted()
    wanted = reference(model)
    optimizers = [torch.optim.AdamW(learning(each).values(), lr=0.01) for each in (model, wanted)]
    for each, optimizer in zip((model, wanted), optimizers, strict=True):
        loss_of(each).backward()
        optimizer.step()
    # the first step was float32's on a base that had not been rounded: bring both to one point
    with torch.no_grad():
        for name, parameter in learning(model).items():
            parameter.copy_(wanted.get_parameter(name))
            state, same = optimizers[0].state[parameter], optimizers[1].state[wanted.get_parameter(name)]
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].copy_(same[key])
    upcast.patch(model)
    got, want = (train(each, o) for each, o in zip((model, wanted), optimizers, strict=True))
    assert want[-1] < want[0]
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-4


def test_trainable_decides_in_doubt() -> None:
    model = adapted().requires_grad_(True)
    upcast.patch(model, trainable=["*.lora_?"])
    assert learning(model).keys() == {name for name, _ in model.named_parameters() if "lora" in name}
    assert len(half_weights(model)) == 2 + 3 * LAYERS
    upcast.unpatch(model)
    assert learning(model).keys() == {name for name, _ in model.named_parameters() if "lora" in name}
    model = adapted()
    upcast.patch(model, trainable=["1.lora_a"])
    assert isinstance(model[1].lora_b, HalfWeight)
    assert type(model[1].lora_a) is nn.Parameter


@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_model_is_for_inference_and_the_plan_says_so(training: bool) -> None:
    model = adapted().requires_grad_(True).train(training)
    said = "inference: all of the weights require grad"
    assert said in str(upcast.plan(model))
    upcast.patch(model)
    assert all(isinstance(p, HalfWeight) for p in model.parameters() if p.dim() > 1)
    assert said in upcast.report(model)


def test_a_frozen_table_of_positions_does_not_make_a_model_one_to_train() -> None:
    model = adapted().requires_grad_(True).eval()
    model[0].weight.requires_grad_(False)
    upcast.patch(model)
    assert all(isinstance(p, HalfWeight) for p in model.parameters() if p.dim() > 1)


def test_adapters_of_another_dtype_become_float32() -> None:
    model = upcast.patch(adapted(torch.bfloat16))
    assert {parameter.dtype for parameter in learning(model).values()} == {torch.float32}
    assert len(learning(model)) == 2 * LAYERS


def test_a_quantized_base_without_adapters_is_left_as_it_is() -> None:
    model = upcast.patch(_quantized("parameter")().requires_grad_(False))
    assert model[2].up.weight.dtype == torch.int8
    assert half_weights(model)


def test_unpatch_gives_back_what_was_trained() -> None:
    model = upcast.patch(adapted())
    train(model, torch.optim.SGD(learning(model).values(), lr=0.1))
    trained = learning(model)
    upcast.unpatch(model)
    assert learning(model) == trained
    assert not half_weights(model)


def _with_optimizer(everything: bool) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = adapted(torch.float32 if everything else torch.bfloat16)
        model.optimizer = torch.optim.SGD(model.parameters() if everything else learning(model).values(), lr=0.1)
        return model

    return make


def _quantized(kind: str) -> Callable[[], nn.Module]:
    """Adapters on a base of which one layer holds integers: as a parameter, as GPTQ's buffer, as torch's own layer."""

    def make() -> nn.Module:
        model = adapted()
        integers = torch.zeros(3 * WIDTH, WIDTH, dtype=torch.int8)
        if kind == "parameter":
            model[2].up.weight = nn.Parameter(integers, requires_grad=False)
        elif kind == "buffer":
            model[2].up.register_buffer("qweight", integers.int())
        else:
            model[2].up = torch.ao.nn.quantized.dynamic.Linear(WIDTH, 3 * WIDTH)
        return model

    return make


# name, the model, keywords, what the error says
REFUSED: list[tuple[str, Callable[[], nn.Module], dict[str, Any], str]] = [
    ("all", lambda: adapted().requires_grad_(), {"trainable": ["*"]}, r"all weights of Sequential.*float32; or freeze"),
    ("nothing", adapted, {"trainable": ["*.up"]}, r"nothing to train.*requires_grad_\(True\)"),
    ("no such name", adapted, {"trainable": ["lora"]}, "trainable pattern 'lora' matches no parameter"),
    ("optimizer of all", _with_optimizer(True), {}, r"SGD optimizer holds 0\.weight, which is frozen.*if p\.requires"),
    ("quantized", _quantized("parameter"), {}, r"2\.up\.weight of Sequential is quantized.*without quantization"),
    ("GPTQ", _quantized("buffer"), {}, r"2\.up\.qweight of Sequential is quantized"),
    ("torch's", _quantized("layer"), {}, r"2\.up of Sequential is quantized"),
    ("optimizer of halves", _with_optimizer(False), {}, "lora_a requires grad.*in float32, as a new parameter"),
]


@pytest.mark.filterwarnings("ignore:.*torch.ao:DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(("make", "options", "message"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_refused(make: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    model = make()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    for function in (upcast.patch, upcast.plan):
        with pytest.raises(upcast.UpcastError, match=message):
            function(model, **options)
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_kernels")
def test_gradients_of_adapters_are_float32_s() -> None:
    model = adapted()
    wanted = reference(model)
    upcast.patch(model)
    loss_of(model).backward()
    loss_of(wanted).backward()
    for name, parameter in learning(model).items():
        assert parameter.grad is not None
        assert relative_error(parameter.grad, wanted.get_parameter(name).grad) < 1e-5, name
    assert fallbacks(model).calls == {}


def _twin(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The portable kernel's formula in the dtype of x."""
    y = x @ weight.to(x.dtype).t()
    return y if bias is None else y + bias


def test_gradcheck_in_double_through_the_reference_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are float32's; the autograd function around them is checked with a double product inside."""
    monkeypatch.setattr(kernels, "unfollowed_linear", _twin)
    weight = torch.randn(5, 7).half()
    x, bias = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    bias.requires_grad_()
    for stored in (weight, torch.randn(7, 5).half().t()):
        assert torch.autograd.gradcheck(lambda x, b, w=stored: kernels.linear(x, w, b), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, w=stored: kernels.linear(x, w).pow(2), (x,))


def test_the_twin_is_the_kernel() -> None:
    x, weight, bias = torch.randn(3, 7), torch.randn(5, 7).half(), torch.randn(5)
    for implementation in (portable, kernels.active()):
        assert relative_error(implementation.linear(x, weight, bias), _twin(x.double(), weight, bias.double())) < 1e-6


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_are_kept_for_backward_as_the_float16_they_are_stored_in() -> None:
    model = upcast.patch(adapted())
    storages = {weight.stored.untyped_storage().data_ptr() for weight in half_weights(model).values()}
    shapes = {tuple(weight.shape) for weight in half_weights(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(model).backward()
    halves = [t for t in kept if t.dtype == torch.float16]
    # The embedding and the first block's base need no gradient of their input: nothing is kept for them.
    assert len(halves) >= 3 * (LAYERS - 1)
    assert all(t.untyped_storage().data_ptr() in storages for t in halves)
    assert not [t for t in kept if t.dtype == torch.float32 and tuple(t.shape) in shapes]


def test_many_steps_leave_memory_flat() -> None:
    model = upcast.patch(adapted())
    optimizer = torch.optim.AdamW(learning(model).values(), lr=0.01)
    train(model, optimizer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        train(model, optimizer)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes
    assert fallbacks(model).calls == {}


# --- Lightning Fabric -------------------------------------------------------------------------------------------------


def test_fabric_trains_as_float32() -> None:
    fabric_of = pytest.importorskip("lightning").Fabric
    losses = []
    for plugins in (upcast.FabricPrecision(), None):
        fabric = fabric_of(accelerator="cpu", devices=1, plugins=plugins)
        model = adapted() if plugins else reference(adapted())
        optimizer = torch.optim.AdamW(learning(model).values(), lr=0.01)
        model, optimizer = fabric.setup(model, optimizer)
        assert bool(half_weights(model)) is bool(plugins)
        losses.append([])
        for _ in range(STEPS):
            loss = loss_of(model)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0][-1] < losses[0][0]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4


def test_fabric_refuses_to_train_everything() -> None:
    fabric = pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1, plugins=upcast.FabricPrecision())
    model = adapted().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(upcast.UpcastError, match=r"requires grad and a SGD optimizer holds it.*Delete the optimizer"):
        fabric.setup(model, optimizer)
    assert not half_weights(model)


def test_fabric_takes_a_patched_module_as_it_is() -> None:
    pytest.importorskip("lightning")
    model = upcast.patch(copy.deepcopy(adapted()))
    assert upcast.FabricPrecision().convert_module(model) is model

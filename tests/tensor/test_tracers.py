"""Tracers, exporters, TorchScript, modes and counters on patched models: as on the unpatched one, or refused."""

import copy
from typing import Any

import litgpt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import upcast
from tests.conftest import Run, assert_patched, half_weights, relative_error, rounded
from tests.tensor.test_graphs import Wrapper
from tests.tensor.test_transforms import TOLERANCE, WARNINGS, Function, Tokens, two
from upcast import kernels
from upcast.kernels import transforms

pytestmark = WARNINGS

# --- TorchScript ------------------------------------------------------------------------------------------------------


def scripted_linear() -> Any:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight)

    return torch.jit.script(Layer())


@pytest.mark.parametrize("child", [scripted_linear, lambda: torch.jit.trace(nn.Linear(5, 5), torch.randn(2, 5))])
def test_a_child_that_torchscript_has_compiled_is_left_alone(child: Function) -> None:
    plain = nn.Sequential(child(), nn.Tanh(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        plain[2].weight.copy_(plain[2].weight.half())
    x = torch.randn(2, 5)
    want = plain(x)
    model = upcast.patch(plain)
    assert list(half_weights(model)) == ["2.weight"]
    assert "compiled by TorchScript" in upcast.report(model)
    assert relative_error(model(x), want) < TOLERANCE
    upcast.unpatch(model)
    assert relative_error(model(x), want) < TOLERANCE


def test_a_script_module_itself_is_refused() -> None:
    with pytest.raises(upcast.UpcastError, match=r"is compiled by TorchScript.*Patch the module"):
        upcast.patch(scripted_linear())


@pytest.mark.parametrize("around", [lambda model: model, Wrapper, lambda model: model[0]])
def test_script_is_refused_before_anything_is_compiled(around: Function) -> None:
    plain, model, x = two("mlp")
    with pytest.raises(upcast.UpcastError, match=r"torch\.jit\.script of a.*patched.*upcast\.unpatch"):
        torch.jit.script(around(model))
    assert relative_error(model(x), plain(x)) < TOLERANCE
    upcast.unpatch(model)
    assert relative_error(torch.jit.script(model)(x), plain(x)) < TOLERANCE


PARTS: dict[str, tuple[Function, Tensor]] = {
    "embedding": (lambda: nn.Embedding(9, 5), torch.arange(4)),
    "convolution": (lambda: nn.Conv1d(3, 4, 3), torch.randn(2, 3, 7)),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), torch.randn(2, 3)),
    "recurrent": (lambda: nn.GRU(3, 4), torch.randn(2, 5, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16), torch.randn(2, 5, 8)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("part", PARTS)
def test_script_of_a_part_is_refused_too(part: str) -> None:
    """TorchScript would run it, and torch.jit.save would read memory that is not there."""
    make, x = PARTS[part]
    model = upcast.patch(nn.ModuleDict({"part": make(), "other": nn.Linear(3, 3)}))
    for each in (model["part"], nn.Sequential(model["part"])):
        with pytest.raises(upcast.UpcastError, match=r"torch\.jit\.script of a.*part.*upcast\.unpatch"):
            torch.jit.script(each)
    upcast.unpatch(model["part"])
    if part not in ("bilinear", "recurrent"):  # torch itself calls these in another model only
        torch.jit.script(model["part"])(x)


# --- modes, counters, profiler ----------------------------------------------------------------------------------------


def flops(model: nn.Module, x: Tensor, *, backward: bool) -> int:
    x = x.clone().requires_grad_(backward)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        y = model.requires_grad_(False)(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv", "bare"])
def test_flops_are_counted(kind: str, backward: bool) -> None:
    plain, model, x = two(kind)
    assert flops(model, x, backward=backward) == flops(plain, x, backward=backward) > 0
    assert half_weights(model)


def test_flops_of_experts_are_counted() -> None:
    x, weight, counts = torch.randn(7, 6), torch.randn(3, 6, 4).half(), torch.tensor([2, 0, 5])
    with FlopCounterMode(display=False) as counter:
        kernels.grouped_linear(x, weight, counts)
    assert counter.get_total_flops() == 2 * 7 * 6 * 4


def test_the_gradient_of_experts_under_a_mode() -> None:
    x, weight, counts = torch.randn(7, 6).requires_grad_(), torch.randn(3, 6, 4).half(), torch.tensor([2, 0, 5])
    (want,) = torch.autograd.grad(kernels.grouped_linear(x, weight, counts).square().sum(), x)
    with FlopCounterMode(display=False):
        (got,) = torch.autograd.grad(kernels.grouped_linear(x, weight, counts).square().sum(), x)
    assert relative_error(got, want) < TOLERANCE


def test_the_profiler_sees_products() -> None:
    _, model, x = two("mlp")
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x)
    assert {event.key: event.count for event in profile.key_averages()}["upcast::linear"] == 2


def test_the_profiler_names_fused_blocks() -> None:
    config = litgpt.Config.from_name("pythia-14m", n_layer=3)
    model = upcast.patch(litgpt.GPT(config).eval())
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(torch.arange(5)[None])
    assert {event.key: event.count for event in profile.key_averages()}["upcast::block"] == 3


def test_quantize_dynamic_starts_from_the_same_weights() -> None:
    plain, model, x = two("mlp")
    quantized = [torch.ao.quantization.quantize_dynamic(each, {nn.Linear}, torch.qint8)(x) for each in (model, plain)]
    assert torch.equal(*quantized)
    assert_patched(model)


def test_nothing_is_followed_in_ordinary_calls() -> None:
    assert not transforms.watched()
    assert not transforms.active()
    assert kernels.direct() is None  # gradients are enabled
    with torch.no_grad():
        assert kernels.direct() is kernels.active()


# --- ONNX -------------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.conv, self.table = Tokens(), nn.Conv1d(5, 8, 3), nn.Parameter(torch.randn(11, 8))

    def forward(self, ids: Tensor) -> Any:
        return F.gelu(self.conv(self.tokens(ids).transpose(1, 2))).transpose(1, 2) @ self.table.t()


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool, tmp_path: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    plain = rounded(Everything().eval())
    model, ids = upcast.patch(copy.deepcopy(plain)), torch.tensor([[1, 2, 3, 4, 5]])
    torch.onnx.export(model, (ids,), tmp_path / "model.onnx", dynamo=dynamo)
    kinds = {each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert relative_error(torch.from_numpy(got), plain(ids)) < TOLERANCE
    assert_patched(model)


def test_onnx_s_table_of_decompositions_knows_our_operators() -> None:
    """What `torch.onnx.export` looks up, also where ONNX is not installed."""
    program = torch.export.export(upcast.patch(Everything().eval()), (torch.tensor([[1, 2, 3, 4, 5]]),))
    lowered = program.run_decompositions(dict(torch._decomp.decomposition_table))
    called = {str(node.target) for node in lowered.graph.nodes if node.op == "call_function"}
    assert not any(name.startswith("upcast.") for name in called)


def test_a_lowered_program_runs_where_nothing_is_patched(tmp_path: Any, python_with_libraries: Run) -> None:
    plain, model, x = two("mlp")
    program = torch.export.export(model, (x,)).run_decompositions(dict(torch._decomp.decomposition_table))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((x, plain(x).detach()), tmp_path / "answer.pt")
    code = """
import sys, torch
x, want = torch.load("answer.pt")
got = torch.export.load("model.pt2").module()(x)
assert (got - want).norm() < 1e-5 * want.norm()
assert "upcast" not in sys.modules
print("same")
"""
    result = python_with_libraries("-W", "ignore", "-c", code)
    assert "same" in result.stdout, result.stderr

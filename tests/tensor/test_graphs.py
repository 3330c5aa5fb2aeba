"""Graphs that tracers make of a patched model, beside those of the unpatched one."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from tests.tensor.test_transforms import MODELS, TOLERANCE, WARNINGS, Function, Tokens, loss, seeded, stacked, two

pytestmark = WARNINGS


def saved(traced: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def jit_function(model: nn.Module, x: Tensor) -> Any:
    model = copy.deepcopy(model).requires_grad_(False)
    traced = torch.jit.trace(lambda x: model(x), x)  # noqa: PLW0108 - a function, not the module
    if half_weights(model):
        assert "Half(" in str(traced.graph)  # the constants are stored in float16
    return saved(traced)(x)


def jit_module(model: nn.Module, x: Tensor) -> Any:
    return saved(torch.jit.trace(copy.deepcopy(model), x))(x)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return 2 * self.model(x)


def jit_wrapped(model: nn.Module, x: Tensor) -> Any:
    traced = saved(torch.jit.trace(Wrapper(copy.deepcopy(model)), x))
    assert all(p.dtype == torch.float32 and p.untyped_storage().nbytes() for p in traced.parameters())
    return traced(x)


def compiled(transform: Function) -> Function:
    def run(model: nn.Module, x: Tensor) -> Any:
        torch._dynamo.reset()
        return torch.compile(transform(model), fullgraph=True, backend="aot_eager")(x)

    return run


def compiled_training(model: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    compiled(loss)(model, x).backward()
    return x.grad


def exported(lower: bool, strict: bool = False) -> Function:
    def run(model: nn.Module, x: Tensor) -> Any:
        program = torch.export.export(model, (x,), strict=strict)
        return (program.run_decompositions() if lower else program).module()(x)

    return run


def exported_dynamic(model: nn.Module, x: Tensor) -> Any:
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    return torch.export.export(model, (torch.cat([x, x, x]),), dynamic_shapes=shapes).module()(torch.cat([x, x]))


def fx(transform: Function = lambda model: model, **settings: Any) -> Function:
    def run(model: nn.Module, x: Tensor) -> Any:
        traced = make_fx(transform(model), **settings)(seeded(x))
        return traced(x)

    return run


TRACERS: dict[str, Function] = {
    "jit.trace of a function": jit_function,
    "jit.trace of a module": jit_module,
    "jit.trace of a wrapper": jit_wrapped,
    "make_fx": fx(),
    "make_fx before dispatch": fx(pre_dispatch=True),
    "make_fx of vmap": lambda model, x: fx(vmap)(model, stacked(x)),
    "make_fx of grad": fx(lambda model: grad(loss(model))),
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "compile": compiled(lambda model: model),
    "compiled training": compiled_training,
    "compile of grad": compiled(lambda model: grad(loss(model))),
    "export": exported(lower=False),
    "strict export": exported(lower=False, strict=True),
    "export, lowered": exported(lower=True),
    "export, any batch": exported_dynamic,
}
NO_TRACE = {  # torch's own limits
    *(("lstm", name) for name in ("make_fx of vmap", "compile", "compiled training", "compile of grad")),
    ("attention", "compile of grad"),
}
LONG = {
    "make_fx of grad",
    "compiled training",
    "compile of grad",
    "strict export",
    "export, lowered",
    "export, any batch",
}
TRACED = [
    pytest.param(model, name, id=f"{model}-{name}", marks=[pytest.mark.slow] if name in LONG and model != "mlp" else [])
    for model in MODELS
    for name in TRACERS
    if (model, name) not in NO_TRACE
]


@pytest.mark.parametrize(("kind", "name"), TRACED)
def test_tracers(kind: str, name: str) -> None:
    plain, model, x = two(kind)
    stored = half_weights(model).keys()
    with torch.set_grad_enabled("grad" in name or "training" in name):
        got, want = (TRACERS[name](each, x) for each in (model, plain))
    assert relative_error(got, want) < TOLERANCE
    assert half_weights(model).keys() == stored


OF_TOKENS: dict[str, Function] = {
    "vmap": lambda model, ids: vmap(model)(ids),
    "make_fx": lambda model, ids: make_fx(model)(ids)(ids),
    "make_fx before dispatch": lambda model, ids: make_fx(model, pre_dispatch=True)(ids)(ids),
    "make_fx of vmap": lambda model, ids: make_fx(vmap(model))(ids)(ids),
    **{name: TRACERS[name] for name in TRACERS if name.startswith(("jit", "export")) or name == "compile"},
}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_tokens(name: str) -> None:
    plain = rounded(Tokens().eval())
    model = upcast.patch(copy.deepcopy(plain))
    ids = torch.tensor([[1, 10, 3], [0, 2, 2]])
    with torch.no_grad():
        assert relative_error(OF_TOKENS[name](model, ids), OF_TOKENS[name](plain, ids)) < TOLERANCE
    assert_patched(model)


def test_a_traced_model_becomes_float32_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    plain, model, x = two("mlp")
    traced = torch.jit.trace(model, x)
    assert "torch.jit.trace" in capsys.readouterr().err
    assert not half_weights(model)
    assert relative_error(model(x), plain(x)) < TOLERANCE
    assert relative_error(traced(x), plain(x)) < TOLERANCE


def test_a_part_of_a_model_is_traced_alone() -> None:
    model = upcast.patch(Tokens().eval())
    ids = torch.tensor([1, 2])
    want = model.embed(ids)
    assert torch.equal(saved(torch.jit.trace(model.embed, ids))(ids), want)
    assert list(half_weights(model)) == ["head.weight"]


def test_traced_graphs_hold_the_operators() -> None:
    _, model, x = two("mlp")
    graph = make_fx(model)(x).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called.count("upcast.linear.default") == 2
    assert "aten.new_empty.default" not in called


def test_symbolic_trace_and_what_runs_its_graphs() -> None:
    plain, _, x = two("mlp")
    patched = upcast.patch(torch.fx.symbolic_trace(copy.deepcopy(plain)))
    traced = torch.fx.symbolic_trace(upcast.patch(copy.deepcopy(plain)))
    for graph in (patched, traced):
        assert_patched(graph)
        for got in (graph(x), torch.fx.Interpreter(graph).run(x), copy.deepcopy(graph)(x)):
            assert relative_error(got, plain(x)) < TOLERANCE

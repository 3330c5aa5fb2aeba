"""torch.compile: the products with float16 weights are custom operators, in one graph with the rest."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import upcast
from tests.conftest import assert_patched, relative_error
from tests.test_transformers import FAMILIES, TOKENS, make

OPERANDS = {
    "rows": lambda: torch.randn(33, 129).half(),
    "transposed": lambda: torch.randn(129, 33).half().t(),
}


@pytest.mark.parametrize("kind", ["GPTNeoXForCausalLM", "LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM"])
def test_a_patched_model_compiles_into_one_graph(kind: str) -> None:
    model = upcast.patch(make(*next(row for row in FAMILIES if row[0] == kind)[:3]))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = model(**TOKENS).logits
        assert relative_error(compiled(**TOKENS).logits, want) < 1e-6
    assert_patched(model)


def test_the_compiled_graph_calls_the_kernels() -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.GELU(), torch.nn.Linear(129, 7)).eval())
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    x = torch.randn(5, 33)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        assert relative_error(compiled(x), model(x)) < 1e-6
    (graph,) = graphs
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["upcast.linear.default", "aten.gelu.default", "upcast.linear.default"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor() -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.GELU(), torch.nn.Linear(129, 7)).eval())
    x = torch.randn(5, 33)
    with torch.no_grad():
        assert relative_error(torch.compile(model, fullgraph=True)(x), model(x)) < 1e-6


def test_compiled_gradients() -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Tanh(), torch.nn.Linear(129, 7)).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) < 1e-6


@pytest.mark.parametrize("layout", OPERANDS)
def test_linear_is_a_well_formed_operator(layout: str) -> None:
    weight = OPERANDS[layout]()
    x = torch.randn(7, 129, requires_grad=True)
    torch.library.opcheck(torch.ops.upcast.linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.upcast.linear.default, (x, weight, torch.randn(33, requires_grad=True)))
    torch.library.opcheck(torch.ops.upcast.linear.default, (torch.randn(2, 3, 129), weight, None))


def test_embedding_and_experts_are_well_formed_operators() -> None:
    torch.library.opcheck(
        torch.ops.upcast.embedding.default, (torch.tensor([[1, 2], [0, 6]]), torch.randn(7, 33).half())
    )
    experts = (torch.randn(7, 33), torch.randn(3, 33, 31).half(), torch.tensor([2, 0, 5]))
    torch.library.opcheck(torch.ops.upcast.grouped_linear.default, experts)

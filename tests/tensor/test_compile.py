"""torch.compile: the products with float16 weights are custom operators, in one graph with the rest."""

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import upcast
from tests.conftest import Run, assert_patched, relative_error, rounded
from tests.integrations.transformers.test_cache import IDS, generated, layers, lively
from tests.transformers_models import FAMILIES, TOKENS, make

OTHERS = ("GPTNeoXForCausalLM", "GPT2LMHeadModel", "Gemma3ForCausalLM")
OPERANDS = {
    "rows": lambda: torch.randn(33, 129).half(),
    "transposed": lambda: torch.randn(129, 33).half().t(),
}


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
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


def test_inductor(python: Run) -> None:
    """Where a service sets `CI`, Inductor is stricter, once per process and only without its cache."""
    code = """
import torch, upcast
from torch._inductor.utils import fresh_cache
model = torch.nn.Sequential(torch.nn.Embedding(9, 33), torch.nn.GELU(), torch.nn.Linear(33, 7)).eval()
model, x = upcast.patch(model), torch.arange(5)
with torch.no_grad(), fresh_cache():
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-6, atol=1e-6)
assert model[2].weight.stored.dtype == torch.float16
print("same")
"""
    result = python("-W", "ignore", "-c", code, CI="true")
    assert "same" in result.stdout, result.stderr


def test_compiled_gradients() -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.Tanh(), torch.nn.Linear(129, 7)).eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) < 1e-6


def _by_generate(model: Any) -> tuple[torch.Tensor, Any]:
    from transformers import CompileConfig

    how = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    return generated(model, cache_implementation="static", compile_config=how)


def _by_forward(model: Any) -> tuple[torch.Tensor, Any]:
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    return generated(model, cache_implementation="static")


def _by_a_step_of_ones_own(model: Any) -> tuple[torch.Tensor, Any]:
    from transformers import StaticCache

    def step(ids: torch.Tensor, at: torch.Tensor) -> Any:
        return model(ids, cache_position=at, past_key_values=cache, use_cache=True).logits[:, -1]

    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = [step(IDS, torch.arange(IDS.shape[1]))]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for at in range(IDS.shape[1], IDS.shape[1] + 3):
        logits.append(compiled(logits[-1].argmax(-1)[:, None], torch.tensor([at])))
    return torch.stack(logits), cache


@pytest.mark.filterwarnings("ignore")  # Transformers' own, about flags; torch's, about caching graphs
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (_by_generate, "grouped heads"),
        pytest.param(_by_forward, "grouped heads", marks=pytest.mark.slow),
        pytest.param(_by_generate, "encoder and decoder", marks=pytest.mark.slow),
        pytest.param(_by_a_step_of_ones_own, "grouped heads", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_static_cache_is_compiled_in_one_graph(recipe: Any, kind: str) -> None:
    model = lively(kind)
    torch.compiler.reset()
    want, _ = recipe(rounded(model))
    upcast.patch(model)
    torch.compiler.reset()
    got, cache = recipe(model)
    assert relative_error(got, want) < 1e-3
    assert_patched(model)
    assert all(layer.keys.dtype == torch.float32 for layer in layers(cache))
    ordinary = all(type(layer.keys) is torch.Tensor for layer in layers(cache))
    assert ordinary  # from the first token, where the model's own call is compiled; else from the first compiled one


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

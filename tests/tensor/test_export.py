"""torch.export: the program of a patched model keeps float16 weights, and answers as the model does."""

from pathlib import Path

import pytest
import torch

import upcast
from tests.conftest import Run, relative_error
from tests.transformers_models import FAMILIES, make
from upcast.tensor.half_weight import HalfWeight

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's own

KINDS = ["GPTNeoXForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM", "MixtralForCausalLM", "BertModel", "ViTModel"]


def small() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 33), torch.nn.Linear(33, 129), torch.nn.GELU())
    return upcast.patch(model.append(torch.nn.Linear(129, 7)).eval())


IDS = torch.tensor([[1, 10, 3], [0, 2, 2]])


def called(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_the_program_opens_float16_weights(strict: bool) -> None:
    model = small()
    program = torch.export.export(model, (IDS,), strict=strict)
    assert torch.equal(program.module()(IDS), model(IDS))
    weights = {name: value for name, value in program.state_dict.items() if name.endswith("weight")}
    assert len(weights) == 3
    assert all(isinstance(weight, HalfWeight) for weight in weights.values())
    assert called(program) == [
        *("upcast.stored.default", "upcast.embedding.default", "upcast.stored.default", "upcast.linear.default"),
        *("aten.gelu.default", "upcast.stored.default", "upcast.linear.default"),
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_lowering_leaves_plain_float16(strict: bool) -> None:
    model = small()
    program = torch.export.export(model, (IDS,), strict=strict).run_decompositions()
    assert torch.equal(program.module()(IDS), model(IDS))
    assert [t.dtype for t in program.state_dict.values() if t.dim() == 2] == [torch.float16] * 3
    assert not any(isinstance(t, HalfWeight) for t in program.state_dict.values())
    assert "upcast.stored.default" not in called(program)


def test_a_program_is_dynamic_and_differentiable() -> None:
    model = small()[1:]
    x = torch.randn(5, 33, requires_grad=True)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert torch.equal(program.module()(x[:3]), model(x[:3]))
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    (got,) = torch.autograd.grad(program.module()(x).sum(), x)
    assert relative_error(got, wanted) < 1e-6


def test_a_saved_program_runs_in_another_process(tmp_path: Path, python_with_libraries: Run) -> None:
    model = small()
    torch.export.save(torch.export.export(model, (IDS,)), tmp_path / "model.pt2")
    torch.save((IDS, model(IDS)), tmp_path / "answer.pt")
    code = """
import torch, upcast
ids, wanted = torch.load("answer.pt")
assert torch.equal(torch.export.load("model.pt2").module()(ids), wanted)
print("same")
"""
    result = python_with_libraries("-W", "ignore", "-c", code)
    assert "same" in result.stdout, result.stderr


def test_other_policies_are_refused() -> None:
    model = upcast.patch(torch.nn.Sequential(torch.nn.Linear(33, 129), torch.nn.GELU()).eval(), policy="norm")
    x = torch.randn(5, 33)
    wanted = model(x)
    with pytest.raises(upcast.UpcastError, match=r"policy norm.*policy='safe'.*export the unpatched model"):
        torch.export.export(model, (x,))
    assert torch.equal(model(x), wanted)


def test_a_guarded_model_exports() -> None:
    model = upcast.patch(torch.nn.Linear(33, 7).eval(), guard=True)
    x = torch.randn(5, 33)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_convolutions_and_operations_that_widen_export() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(5, 9, 3)
            self.table = torch.nn.Parameter(torch.randn(7, 9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mT.cumsum(1) @ torch.cumsum(self.table, 0).t()

    model = upcast.patch(Odd().eval())
    x = torch.randn(2, 5, 8)
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_export(kind: str) -> None:
    name, config, sizes, inputs = next(row for row in FAMILIES if row[0] == kind)
    model = upcast.patch(make(name, config, sizes))
    inputs = {**inputs, **({"use_cache": False} if "CausalLM" in kind else {})}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        assert relative_error(program.module()(**inputs)[0], model(**inputs)[0]) < 1e-6


def test_litgpt_exports() -> None:
    litgpt = pytest.importorskip("litgpt")
    model = upcast.patch(litgpt.GPT.from_name("pythia-14m", n_layer=2, block_size=64, padded_vocab_size=128).eval())
    with torch.no_grad():
        program = torch.export.export(model, (IDS,))
        assert relative_error(program.module()(IDS), model(IDS)) < 1e-6


def test_a_plain_tensor_is_no_weight_of_a_program() -> None:
    with pytest.raises(upcast.UpcastError, match=r"numbers that float16 does not have.*exported with"):
        torch.ops.upcast.stored(torch.randn(3, 3))

"""A packed folder under UPCAST=1: found by every door of LitGPT, and what upcast cannot serve has one clear error."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.integrations import convert_packed

pytest.importorskip("litgpt")

NOT_OURS = "holds packed weights, which upcast alone reads, and this call is not for upcast: {}. Leave that out, or"
LOAD = "from litgpt import LLM\nllm = LLM.load('packed', distribute=None)\n"
GENERATE = "import sys\nfrom litgpt.__main__ import main\nsys.argv = ['litgpt', {}]\nmain()\n"
NAMED = GENERATE.format("'generate', 'some/model', '--max_new_tokens', '3'")

# a program -> what it ends with
REFUSED = {
    LOAD + "llm.distribute(precision='bf16-mixed')": NOT_OURS.format("precision='bf16-mixed'"),
    LOAD + "llm.distribute(quantize='bnb.nf4')": NOT_OURS.format("quantize='bnb.nf4'"),
    GENERATE.format("'generate', 'packed', '--precision', 'bf16-mixed'"): NOT_OURS.format("precision='bf16-mixed'"),
    "import litgpt\nlitgpt.LLM.load('damaged')": "damaged/lit_model.safetensors",
    GENERATE.format("'generate', 'damaged'"): "damaged/lit_model.safetensors",
    "import litgpt.generate.adapter as a\na.lazy_load(filename='damaged/lit_model.pth')": (
        "damaged/lit_model.safetensors"
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which ``packed``, ``damaged`` and the model ``some/model`` lie."""
    config = small_config("SmolLM2-135M-Instruct", block_size=512, n_embd=64, intermediate_size=160)
    made = write_checkpoint(tmp_path / "made", config, torch.bfloat16)
    for name in ("packed", "damaged", "checkpoints/some/model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        convert_packed.pack(made, tmp_path / name)
    file = tmp_path / "damaged" / "lit_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return tmp_path


@pytest.mark.parametrize("program", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_for_upcast_ends_with_the_reason(folder: Path, python_with_libraries: Run, program: str) -> None:
    done = python_with_libraries("-c", program, UPCAST="1")
    assert done.returncode != 0
    assert REFUSED[program] in done.stderr


def test_a_model_s_name_finds_it(folder: Path, python_with_libraries: Run) -> None:
    done = python_with_libraries("-c", NAMED, UPCAST="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("upcast: GPT ") == 1


SERVE = """
from pathlib import Path
from litgpt.deploy import serve
serve.LitServer = lambda api, **_: (print(type(api).__name__, api.checkpoint_dir), exit())
serve.run_server(Path("packed"), devices=1, accelerator="cpu")
"""


def test_a_server_finds_it(folder: Path, python_with_libraries: Run) -> None:
    pytest.importorskip("litserve")
    done = python_with_libraries("-c", SERVE, UPCAST="1")
    assert done.stdout.split()[-2:] == ["SimpleLitAPI", "packed"], done.stderr


EVALUATE = """
import sys, types
import torch
from pathlib import Path
evaluator, made = types.ModuleType("lm_eval.evaluator"), []
evaluator.simple_evaluate = lambda **_: {}
huggingface = types.ModuleType("lm_eval.models.huggingface")
huggingface.HFLM = lambda pretrained, **_: made.append(pretrained)
sys.modules.update({"lm_eval": types.ModuleType("lm_eval"), "lm_eval.models": types.ModuleType("lm_eval.models")})
sys.modules.update({"lm_eval.evaluator": evaluator, "lm_eval.models.huggingface": huggingface})
sys.modules["lm_eval"].evaluator = evaluator
from litgpt.eval import evaluate
evaluate.prepare_results = lambda *_: None
evaluate.convert_and_evaluate(Path(sys.argv[1]), tasks="none", out_dir="out")
weights = torch.load(Path(*made) / "pytorch_model.bin")
print({str(each.dtype) for each in weights.values()}, sum(float(each.double().norm()) for each in weights.values()))
"""


def test_an_evaluation_finds_it(folder: Path, python_with_libraries: Run) -> None:
    found = {}
    for name in ("made", "packed"):
        done = python_with_libraries("-c", EVALUATE, name, UPCAST="1")
        assert done.returncode == 0, done.stderr
        found[name] = done.stdout.splitlines()[-1]
        assert not [*(folder / "out").glob("base-*")]
        (folder / "out" / "pytorch_model.bin").unlink()
    assert found["packed"] == found["made"]
    assert "torch.bfloat16" in found["packed"]


def test_a_missing_tokenizer_is_litgpt_s_error(folder: Path, python_with_libraries: Run) -> None:
    for file in (folder / "packed").glob("tokenizer*"):
        file.unlink()
    done = python_with_libraries("-c", GENERATE.format("'generate', 'packed'"), UPCAST="1")
    assert done.returncode != 0
    assert "is missing the files: ['tokenizer.json OR tokenizer.model', 'tokenizer_config.json']" in done.stderr

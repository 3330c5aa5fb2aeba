"""LitGPT: loading without a copy, generation, and the errors of broken checkpoint folders."""

import argparse
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import upcast
from tests.conftest import Run, address, assert_patched, fallbacks, half_weights, relative_error
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.patching.discovery import unwrap

pytest.importorskip("litgpt")

NAMES = [
    "pythia-160m",
    "SmolLM2-135M-Instruct",
    "Gemma-2-2b",
    "Qwen3-0.6B",
    "Mixtral-8x7B-v0.1",
    "phi-2",
    "OLMo-2-1124-7B",
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IDS = torch.arange(14).view(2, 7) * 9


def float32_model(folder: Path, wide: Sequence[str] = ()) -> Any:
    """The checkpoint in plain LitGPT, float32 math on float16-rounded weights."""
    from litgpt import GPT, Config

    model = GPT(Config.from_file(folder / "model_config.yaml")).eval()
    state = torch.load(folder / "lit_model.pth")
    model.load_state_dict({k: v.float() if v.dim() < 2 or k in wide else v.half().float() for k, v in state.items()})
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", small_config("SmolLM2-135M-Instruct"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_float32(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config(name), dtype)
    model = upcast.load_litgpt(folder)
    assert_patched(model)
    assert not model.training
    with torch.inference_mode():
        got, want = model(IDS), float32_model(folder)(IDS)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-6
    assert fallbacks(model).calls == {}


def test_a_float16_checkpoint_is_mapped_and_not_copied(folder: Path) -> None:
    model = upcast.load_litgpt(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "lit_model.pth" in line]
    ranges = [tuple(int(part, 16) for part in line[0].split("-")) for line in maps]
    for weight in half_weights(model).values():
        assert any(start <= address(weight) < end for start, end in ranges)


def test_a_float32_checkpoint_remembers_what_it_was(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.float32)
    model = upcast.load_litgpt(folder)
    plan = upcast.patching.engine.record_of(model).plan
    lost = {change.name: change.rounding.max_error for change in plan.changes if change.in_float16}
    assert all(error > 0 for error in lost.values())
    assert plan.bytes_after < 0.6 * plan.bytes_before
    upcast.unpatch(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_float16_cannot_hold_stays_in_float32(tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["transformer.h.1.mlp.proj.weight"][0, 0] = 1e6

    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.float32, spoil)
    model = upcast.load_litgpt(folder)
    assert model.transformer.h[1].mlp.proj.weight.dtype == torch.float32
    assert not isinstance(model.transformer.h[1].mlp.proj.weight, upcast.HalfWeight)
    assert model.transformer.h[1].mlp.proj.weight[0, 0].item() == 1e6


def test_twins_share_one_storage(tmp_path: Path) -> None:
    def tie(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["transformer.wte.weight"].clone()

    model = upcast.load_litgpt(write_checkpoint(tmp_path / "c", small_config("SmolLM2-135M-Instruct"), spoil=tie))
    assert address(model.lm_head.weight) == address(model.transformer.wte.weight)


@pytest.mark.parametrize("name", ["pythia-160m", "SmolLM2-135M-Instruct", "Gemma-2-2b"])
def test_generation_with_a_cache_equals_float32(tmp_path: Path, name: str) -> None:
    from litgpt.generate.base import generate

    folder = write_checkpoint(tmp_path / "checkpoint", small_config(name))
    texts = []
    for model in (upcast.load_litgpt(folder), float32_model(folder)):
        with torch.inference_mode():
            model.set_kv_cache(batch_size=1, max_seq_length=40)
            texts.append(generate(model, IDS[1], max_returned_tokens=40, temperature=0.0).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", ["FabricPrecision", "patch"])
def test_litgpt_s_load_checkpoint_fills_a_patched_model(tmp_path: Path, by: str, dtype: torch.dtype) -> None:
    from lightning import Fabric
    from litgpt import GPT, Config
    from litgpt.utils import load_checkpoint

    def spoil(state: dict[str, torch.Tensor]) -> None:
        if dtype is not torch.float16:
            state["transformer.h.1.mlp.proj.weight"][0, 0] = 70000.0

    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), dtype, spoil)
    plugins = upcast.FabricPrecision() if by == "FabricPrecision" else None
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    model = GPT(Config.from_file(folder / "model_config.yaml"))
    model = fabric.setup_module(model if plugins else upcast.patch(model)).eval()
    load_checkpoint(fabric, model, folder / "lit_model.pth")
    weights = unwrap(model).named_parameters()
    wide = [name for name, p in weights if p.dim() > 1 and not isinstance(p, upcast.HalfWeight)]
    assert wide == ([] if dtype is torch.float16 else ["transformer.h.1.mlp.proj.weight"])
    with torch.inference_mode():
        want = float32_model(folder, wide)(IDS)
        assert relative_error(model(IDS), want) < 1e-6


# --- UPCAST=1 ---------------------------------------------------------------------------------------------------------

STORY = """
from litgpt import LLM
llm = LLM.load("EleutherAI/pythia-160m")
text = llm.generate("What do Llamas eat?")
"""

MORE = """
import torch, upcast
assert isinstance(llm.model.lm_head.weight, upcast.HalfWeight)
assert llm.model(torch.tensor([[1, 2]])).dtype == torch.float32
a = llm.generate("What do Llamas eat?", top_k=1, max_new_tokens=5)
b = llm.generate("What do Llamas eat? They eat a lot, and then", top_k=1, max_new_tokens=9)  # a growing prompt
assert "".join(llm.generate("What do Llamas eat?", top_k=1, max_new_tokens=5, stream=True)) == a
print("finished", len(b))
"""


def break_float16(state: dict[str, torch.Tensor]) -> None:
    """Synthetic outliers in block 2: large Q and K biases as in Pythia, and an MLP whose output passes 65504."""
    block = "transformer.h.2."
    bias = state[block + "attn.qkv.bias"]
    bias[: 2 * len(bias) // 3] = 300.0
    state[block + "mlp.fc.bias"][:] = 300.0
    state[block + "mlp.proj.weight"][:] = 1.0


@pytest.fixture
def story(tmp_path: Path) -> Path:
    config = small_config("pythia-160m", n_embd=128, n_head=2, n_query_groups=2)
    return write_checkpoint(tmp_path / "checkpoints/EleutherAI/pythia-160m", config, spoil=break_float16)


def test_the_story_s_script_runs_unmodified(story: Path, python: Run) -> None:
    result = python("-c", STORY + MORE, UPCAST="1")
    assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout
    assert result.stderr.count("upcast: GPT ") == 1


def test_the_story_in_plain_float16_fails_until_it_is_patched(story: Path, python_with_libraries: Run) -> None:
    script = """
import torch, upcast
from litgpt import LLM
llm = LLM.load("EleutherAI/pythia-160m", distribute=None)
llm.distribute(precision="16-true")
try:
    llm.generate("What do Llamas eat?")
except RuntimeError as error:
    print(error)
upcast.patch(llm)
assert llm.model(torch.tensor([[1, 2]])).dtype == torch.float32
llm.generate("What do Llamas eat?", max_new_tokens=5)
"""
    result = python_with_libraries("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "probability tensor contains either `inf`, `nan` or element < 0\n"


DISTRIBUTE = [
    ({}, "upcast: GPT "),
    ({"fixed_kv_cache_size": 64}, "upcast: GPT "),
    ({"precision": "16-true"}, "upcast: GPT "),
    ({"accelerator": "cpu", "devices": 1}, "upcast: GPT "),
    ({"precision": 32}, "upcast: GPT "),
    ({"precision": "bf16-mixed"}, "unpatched: precision='bf16-mixed'"),
    ({"precision": "bf16"}, "unpatched: precision='bf16'"),  # Fabric's short name for it
    ({"precision": "64-true"}, "unpatched: precision='64-true'"),
    ({"precision": 64}, "unpatched: precision=64"),
]

WAYS = """
import json, sys
import torch
from litgpt import LLM
for arguments in json.loads(sys.argv[1]):
    print("#", file=sys.stderr)
    llm = LLM.load("EleutherAI/pythia-160m", distribute=None)
    llm.distribute(**arguments)
    llm.generate("What do Llamas eat?", top_k=1, max_new_tokens=5)
    wanted = torch.float64 if "64" in str(arguments.get("precision")) else torch.float32
    assert llm.model.lm_head.weight.dtype is wanted, arguments
"""


def test_distribute(story: Path, python_with_libraries: Run) -> None:
    result = python_with_libraries("-c", WAYS, json.dumps([arguments for arguments, _ in DISTRIBUTE]), UPCAST="1")
    assert result.returncode == 0, result.stderr
    _, *spoken = result.stderr.split("#\n")
    for (arguments, said), found in zip(DISTRIBUTE, spoken, strict=True):
        assert said in found, arguments


# What pretraining and finetuning put beside the weights; torch's safe reader takes some of it.
BESIDE: dict[str, Callable[[], Any]] = {
    "a number": lambda: 3,
    "a path": lambda: Path("out/pretrain"),
    "a numpy number": lambda: np.float64(0.5),
    "a numpy array": lambda: np.arange(3),
    "arguments": lambda: argparse.Namespace(seed=3),
}

LOAD = """
import json, sys
import torch, upcast
from litgpt import LLM
for name in json.loads(sys.argv[1]):
    llm = LLM.load(name)
    patched = isinstance(llm.model.lm_head.weight, upcast.HalfWeight)
    assert "lm_head.weight" in str(upcast.plan(llm))
    if patched:
        assert "lm_head.weight" in str(upcast.report(llm))
        assert upcast.unpatch(llm) is llm
        assert type(llm.model.lm_head.weight) is torch.nn.Parameter
    assert llm.model(torch.arange(8)[None]).isfinite().all()
    print(json.dumps([name, patched]))
"""


def test_what_lies_beside_the_weights(tmp_path: Path, python_with_libraries: Run) -> None:
    names = [name.replace(" ", "_") for name in BESIDE]
    for name, make in zip(names, BESIDE.values(), strict=True):
        folder = write_checkpoint(tmp_path / name, small_config("pythia-160m"))
        state = torch.load(folder / "lit_model.pth")
        torch.save({"model": state, "hparams": {"it": make()}}, folder / "lit_model.pth")
    result = python_with_libraries("-c", LOAD, json.dumps(names), UPCAST="1")
    assert result.returncode == 0, result.stderr
    found = dict(map(json.loads, result.stdout.splitlines()))
    assert list(found) == names
    assert found["a_number"]
    for name, patched in found.items():
        assert patched or f"{name}/lit_model.pth holds more than tensors" in result.stderr


def test_the_environment_chooses_the_cache(story: Path, python_with_libraries: Run) -> None:
    script = """
from litgpt import LLM
loaded = LLM.load("EleutherAI/pythia-160m")
fixed = LLM.load("EleutherAI/pythia-160m", distribute=None)
fixed.distribute(fixed_kv_cache_size=64)
for llm in (loaded, fixed):
    llm.generate("What do Llamas eat?", top_k=1, max_new_tokens=5)
    print({block.attn.kv_cache.k.dtype for block in llm.model.transformer.h})
"""
    result = python_with_libraries("-c", script, UPCAST="1", UPCAST_KV_CACHE="float32")
    assert result.stdout.split() == ["{torch.float32}"] * 2, result.stderr


def test_random_weights_are_patched_too(story: Path, python_with_libraries: Run) -> None:
    script = """
from litgpt import LLM
import upcast
llm = LLM.load("pythia-14m", init="random", tokenizer_dir="checkpoints/EleutherAI/pythia-160m")
assert isinstance(llm.model.lm_head.weight, upcast.HalfWeight)
"""
    result = python_with_libraries("-c", script, UPCAST="1")
    assert result.returncode == 0, result.stderr


def test_a_folder_without_a_tokenizer(story: Path, python_with_libraries: Run) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (story / name).unlink()
    result = python_with_libraries("-c", STORY, UPCAST="1")
    assert result.returncode != 0
    assert "missing the files: ['tokenizer.json OR tokenizer.model', 'tokenizer_config.json']" in result.stderr


# --- broken folders ---------------------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    content = (folder / "lit_model.pth").read_bytes()
    (folder / "lit_model.pth").write_bytes(content[: len(content) // 2])


def _other_config(folder: Path) -> None:
    text = (folder / "model_config.yaml").read_text()
    (folder / "model_config.yaml").write_text(text.replace("n_embd: 32", "n_embd: 64"))


def _more_layers(folder: Path) -> None:
    text = (folder / "model_config.yaml").read_text()
    (folder / "model_config.yaml").write_text(text.replace("n_layer: 3", "n_layer: 4"))


def _code(folder: Path) -> None:
    torch.save({"model": Path("x"), "f": print}, folder / "lit_model.pth")


def _numbers(folder: Path) -> None:
    torch.save({"a": 1}, folder / "lit_model.pth")


def _bare_pickle(folder: Path) -> None:
    (folder / "lit_model.pth").write_bytes(pickle.dumps(Path("x")))


BROKEN = [
    ("no weights", lambda f: (f / "lit_model.pth").unlink(), r"no file .*lit_model\.pth.*Check the path"),
    ("no config", lambda f: (f / "model_config.yaml").unlink(), r"no file .*model_config\.yaml.*litgpt download"),
    ("a config of nothing", lambda f: (f / "model_config.yaml").write_text("a: 1"), "is not a LitGPT config"),
    ("truncated", _truncate, "cannot be read, it may be truncated"),
    ("empty", lambda f: (f / "lit_model.pth").write_bytes(b""), "cannot be read, it may be truncated"),
    ("of another config", _other_config, r"the config says .* must belong together"),
    ("of fewer layers", _more_layers, r"n_layer is 4, and .* has the weights of 3; .* must belong together"),
    ("code", _code, "holds more than tensors, and loading it could run code"),
    ("numbers", _numbers, "is not a state dict"),
    ("a bare pickle", _bare_pickle, "holds more than tensors|cannot be read"),
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("damage", "message"), [pytest.param(f, m, id=n) for n, f, m in BROKEN])
def test_broken_folders(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.load_litgpt(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(upcast.UpcastError, match="no file"):
        upcast.load_litgpt(tmp_path / "nowhere")


def test_checkpoints_nested_under_model(folder: Path) -> None:
    want = upcast.load_litgpt(folder)(IDS)
    torch.save({"model": torch.load(folder / "lit_model.pth")}, folder / "lit_model.pth")
    assert torch.equal(upcast.load_litgpt(folder)(IDS), want)


def test_checkpoints_of_the_old_format(folder: Path) -> None:
    want = upcast.load_litgpt(folder)(IDS)
    state = torch.load(folder / "lit_model.pth")
    torch.save(state, folder / "lit_model.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(upcast.load_litgpt(folder)(IDS), want)

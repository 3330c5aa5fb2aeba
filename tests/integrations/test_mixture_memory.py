"""Mixtures of experts: what loading them holds at most, and which experts' bytes a decoded token reads."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Run
from tests.integrations.test_loading import peaks_of_loading
from tests.transformers_models import TEXT, make

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LARGE = {**TEXT, "hidden_size": 768, "num_hidden_layers": 5, "num_attention_heads": 12, "num_key_value_heads": 4}
CHECKPOINTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LARGE, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1536},
    ),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LARGE, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384, "head_dim": 64},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_peak_memory_of_loading(tmp_path: Path, python: Run, kind: str, dtype: torch.dtype) -> None:
    """A checkpoint names its experts one by one, and Transformers 5 merges them."""
    model = make(*CHECKPOINTS[kind]).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    assert "experts.3." in (tmp_path / "model.safetensors.index.json").read_text()
    sizes = [p.numel() for p in model.parameters()]
    (grown,) = peaks_of_loading(python, tmp_path)
    print(f"{kind} {dtype}: weights in float16 {2 * sum(sizes) / 1e6:.0f} MB, peak {grown / 1e6:.0f} MB")
    assert 0.9 * 2 * sum(sizes) < grown < 2 * sum(sizes) + max(sizes) * dtype.itemsize + 150e6


# --- what a token reads -----------------------------------------------------------------------------------------------

SIZES = {**TEXT, "hidden_size": 256, "head_dim": 32, "num_attention_heads": 8}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {**SIZES, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 2},
    "Qwen3Moe": {**SIZES, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 2},
    "GptOss": {**SIZES, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 2},
}
WAYS = ["eager", "batched_mm", "grouped_mm"]

DECODE = """
import ctypes, json, mmap, os, sys
import torch, transformers, upcast
kinds, ways, forbid = json.loads(sys.argv[1])
for kind, sizes in kinds.items():  # a process for each kind, of which none imports the libraries again
    torch.manual_seed(0)
    if not os.fork():
        break
    print("exit", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**sizes)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
upcast.patch(model)
experts = [(n, p.stored) for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3]

routes = []
def note(module, args, output):
    routes.append(set(next(part for part in output if part.dtype == torch.int64).flatten().tolist()))
for name, module in model.named_modules():
    if name.endswith(("mlp.gate", "mlp.router")):
        module.register_forward_hook(note)

def decode(chosen):
    with torch.inference_mode():
        cache = model(torch.tensor([[5, 9, 3]]), use_cache=True).past_key_values
        routes.clear()
        closed = protect(chosen, 0) if chosen else 0
        logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    if chosen:
        assert routes == chosen, routes
        protect(chosen, mmap.PROT_READ | mmap.PROT_WRITE)
    return logits, list(routes), closed

def protect(chosen, how):
    size = 0
    for name, weight in experts:
        for expert, rows in enumerate(weight):
            if (expert in chosen[int(name.split("layers.")[1][0])]) == (forbid == "chosen"):
                start = -(-rows.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (rows.data_ptr() + rows.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
                assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), how) == 0
                size += end - start
    return size

for way in ways:
    model.set_experts_implementation(way)
    first, chosen, _ = decode(None)
    assert len(chosen) == 2 and all(len(route) == 2 for route in chosen), chosen
    second, _, closed = decode(chosen)
    print(way, closed, torch.equal(first, second), flush=True)
os._exit(0)
"""


def decode(python: Run, kinds: dict[str, Any], ways: list[str], forbid: str) -> list[list[str]]:
    """Decode a token of each kind while some experts' memory may not be read: whoever does is killed.

    Return the words of each line: three for a way that worked, and then how the kind's process ended.
    """
    result = python("-c", DECODE, json.dumps([kinds, ways, forbid]))
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_a_token_reads_its_experts_only(python_with_libraries: Run) -> None:
    lines = decode(python_with_libraries, KINDS, WAYS, "others")
    assert [line[0] for line in lines] == [*WAYS, "exit"] * len(KINDS)
    whole = 2 * 14 * 3 * 256 * 256 * 2  # layers, experts, matrices, rows, columns, bytes
    for way, *found in lines:
        if way == "exit":
            assert found == ["0"]
        else:
            assert found[1] == "True"
            assert 0.95 * whole < int(found[0]) <= whole  # pages that an expert shares with a neighbour stay open


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_reading_a_closed_expert_is_fatal(python_with_libraries: Run) -> None:
    assert decode(python_with_libraries, {"Mixtral": KINDS["Mixtral"]}, WAYS[:1], "chosen") == [
        ["exit", str(-signal.SIGSEGV)]
    ]

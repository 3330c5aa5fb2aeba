"""No rank ever holds the whole model: its weights, and the peak while loading from a checkpoint of any dtype."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness import memory
from tests.distributed.test_distributed import ROOT, run_ranks
from tests.litgpt_checkpoints import write_checkpoint

pytest.importorskip("litgpt")
transformers = pytest.importorskip("transformers")

WIDTH, INNER, LAYERS, HEADS, VOCABULARY = 1024, 2816, 8, 16, 2048
LARGEST = 3 * WIDTH * WIDTH  # elements of LitGPT's fused qkv, the largest tensor
SLACK = 30_000_000  # bytes: the allocator, the modules, and pages of every tensor that its checksum reads
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DOORS = ("litgpt", "UPCAST=1", "from_pretrained")
pytestmark = pytest.mark.skipif(not memory.supported(), reason="the peak is read from /proc")


def write(door: str, folder: Path, dtype: torch.dtype, width: int = WIDTH, inner: int = INNER) -> int:
    """Write a Llama (of about 110e6 weights), and return its bytes in float16, in vectors float32."""
    if door == "litgpt":
        from litgpt import Config

        sizes = {"n_embd": width, "intermediate_size": inner, "n_layer": LAYERS, "n_head": HEADS, "head_size": None}
        vocabulary = {"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "block_size": 64}
        write_checkpoint(folder, Config.from_name("Llama-2-7b-hf", **sizes, **vocabulary, n_query_groups=HEADS), dtype)
        state = torch.load(folder / "lit_model.pth", mmap=True)
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": LAYERS}
        more = {"num_attention_heads": HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)).to(dtype)
        model.save_pretrained(folder)
        state = model.state_dict()
    return sum(tensor.numel() * (2 if tensor.dim() > 1 else 4) for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("door", DOORS)
def test_no_rank_holds_the_whole_model(door: str, dtype: str, ranks: int, tmp_path: Path) -> None:
    whole = write(door, tmp_path / "model", DTYPES[dtype])
    write(door, tmp_path / "small", DTYPES[dtype], 64, 128)
    worker = [ROOT / "tests" / "rss_worker.py", door, tmp_path / "small", tmp_path / "model"]
    outputs = run_ranks(ranks, worker, environment={"UPCAST": "1"} if door == "UPCAST=1" else {})
    assert [code for *_, code in outputs] == [0] * ranks, outputs
    # Transformers 5 leaves the embedding and, of Llama, gathers the head: it divides the rest
    replicated = 2 * VOCABULARY * WIDTH if door != "litgpt" else 0
    for rank, (out, _, _) in enumerate(outputs):
        found = json.loads(out.splitlines()[-1])
        print(f"{door} {dtype}, rank {rank} of {ranks}: model {whole / 1e6:.1f} MB, weights {found['held'] / 1e6:.1f} "
              f"MB, peak {found['grown'] / 1e6:.1f} MB")  # fmt: skip
        assert found["halves"] == (5 if door == "litgpt" else 7) * LAYERS + 2
        assert found["wide"] == 0
        assert found["held"] <= (1 / ranks + 0.02) * whole + replicated
        # on the way: the largest tensor as it comes, this rank's part of it, and that part in float16
        on_the_way = LARGEST * (DTYPES[dtype].itemsize * (1 + 1 / ranks) + 2 / ranks)
        if door == "litgpt":  # Transformers takes more on the way: several threads hand over tensors at once
            assert found["grown"] <= (1 / ranks + 0.02) * whole + on_the_way + SLACK
        assert found["grown"] < 0.9 * whole

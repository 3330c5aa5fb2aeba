"""LitGPT models divided between ranks equal one process, in every family; each rank holds only its part."""

import dataclasses
import datetime
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

import upcast
from tests.conftest import Run, relative_error
from tests.distributed_worker import load, results
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.warm import Warm
from upcast.core import config
from upcast.core.errors import UpcastError
from upcast.distributed import rendezvous
from upcast.distributed.sharding import divide_heads, even, turned
from upcast.integrations import convert_packed

pytest.importorskip("litgpt")

ROOT = Path(__file__).parents[2]
LIMIT = 1e-5

WIDE = {"n_embd": 256, "n_query_groups": 2, "intermediate_size": 384}  # narrower ones do not get smaller
# What each adds: fused qkv and biases, both halves from one input; grouped queries; a norm per head; one group for
# all heads and shared embeddings; experts and their router; an uneven number of groups, rows and tokens.
MODELS = {
    "neox": ("pythia-14m", {}),
    "llama": ("Llama-3.2-1B", {}),
    "qwen3": ("Qwen3-0.6B", {}),
    "gemma": ("Gemma-2b", {}),
    "gemma2": ("Gemma-2-2b", {}),
    "mixtral": ("Mixtral-8x7B-v0.1", {}),
    "few-experts": ("Mixtral-8x7B-v0.1", {"n_expert": 3, "n_expert_per_token": 2}),
    "uneven": (
        "Llama-3.2-1B",
        {"n_head": 9, "n_query_groups": 3, "n_embd": 72, "intermediate_size": 101, "padded_vocab_size": 323},
    ),
    "packing": ("Llama-3.2-1B", WIDE),  # from bfloat16, while it is read
    "packed": ("Llama-3.2-1B", WIDE),  # in its file
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set; one thread for each rank."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("UPCAST_K")}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return {**clean, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def run_ranks(
    ranks: int,
    arguments: Sequence[object],
    timeout: float = 240,
    environment: Mapping[str, str] = MappingProxyType({}),
    warm_process: Warm | None = None,
) -> list[Any]:
    """Start one process per rank, wait for all, and return each one's output, errors and exit code.

    They are forks of ``warm_process``, where one is given.
    """
    port, command = free_port(), [sys.executable, *map(str, arguments)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    places = [{**rank_environment(rank, ranks, port), **environment} for rank in range(ranks)]
    if warm_process is not None and warm_process.ready():
        ended = warm_process.run(command[1:], places, ROOT, timeout)
        return [(each.stdout, each.stderr, each.returncode) for each in ended]
    started = [subprocess.Popen(command, env=place, **pipes) for place in places]
    try:
        return [(*process.communicate(timeout=timeout), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("checkpoints")

    def spoil(state: dict[str, Tensor]) -> None:
        for name, tensor in state.items():
            if tensor.dim() == 1:  # biases are zeros and norms are ones otherwise: twice added, they would not show
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)

    for name, (base, changes) in MODELS.items():
        dtype = torch.bfloat16 if changes is WIDE else torch.float16
        write_checkpoint(home / name, small_config(base, **changes), dtype, spoil=spoil)
    convert_packed.pack((home / "packed").rename(home / "plain"), home / "packed")
    return {name: home / name for name in MODELS}


def measure(
    process: Warm, ranks: int, checkpoints: dict[str, Path], output: Path, wire: str = "float32"
) -> dict[str, list[Any]]:
    output.mkdir()
    worker = ROOT / "tests" / "distributed_worker.py"
    for _, errors, code in run_ranks(ranks, [worker, output, wire, *checkpoints.values()], warm_process=process):
        assert code == 0, errors
    return {name: [torch.load(output / f"{name}-{rank}.pt") for rank in range(ranks)] for name in checkpoints}


@pytest.fixture(scope="module")
def alone(checkpoints: dict[str, Path]) -> dict[str, Any]:
    with torch.inference_mode():
        return {name: results(load(path)) for name, path in checkpoints.items()}


def check(found: dict[str, list[Any]], alone: dict[str, Any], limit: float) -> None:
    for name, every in found.items():
        for rank in every:
            assert rank["fused"] > 0, name
            assert rank["blocks"] == alone[name]["blocks"] > 0, name
            assert not rank["float32"], name
            assert rank["calls"] > 0, name
            assert (rank["packed"] > 10) == name.startswith("pack"), name
            for what in ("whole", "steps", "copy"):
                assert relative_error(rank[what], alone[name][what]) < limit, (name, what)
            assert torch.equal(rank["whole"], every[0]["whole"]), name
        if limit == LIMIT:
            assert all(rank["text"].tolist() == alone[name]["text"].tolist() for rank in every), name


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_one_process(
    warm_process: Warm, ranks: int, checkpoints: dict[str, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    found = measure(warm_process, ranks, checkpoints, tmp_path / "o")
    check(found, alone, LIMIT)
    for name, every in found.items():
        assert max(rank["bytes"] for rank in every) < 0.8 * alone[name]["bytes"], name


@pytest.mark.slow
@pytest.mark.parametrize(("wire", "limit"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_sums_in_half_precision(
    warm_process: Warm, wire: str, limit: float, checkpoints: dict[str, Path], alone: dict[str, Any], tmp_path: Path
) -> None:
    check(measure(warm_process, 2, checkpoints, tmp_path / "o", wire), alone, limit)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("ranks", [2, 4])
def test_smollm2(warm_process: Warm, ranks: int, smollm2: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        want = results(upcast.load_litgpt(smollm2, kv_cache="float32"))
    found = measure(warm_process, ranks, {smollm2.name: smollm2}, tmp_path / "o")[smollm2.name]
    check({"smollm2": found}, {"smollm2": want}, LIMIT)
    groups_held = max(ranks, 3) / 3 - 1  # ranks that share a query group each hold its keys and values
    replicated = groups_held * 30 * 2 * 3 * 64 * 576 * 2 / ranks
    assert max(rank["bytes"] for rank in found) <= (1 / ranks + 0.02) * want["bytes"] + replicated


@pytest.mark.parametrize(("total", "parts"), [(8, 2), (9, 2), (9, 4), (5, 5)])
def test_parts_cover_everything_once(total: int, parts: int) -> None:
    ranges = even(total, parts, "things")
    assert [i for start, end in ranges for i in range(start, end)] == list(range(total))
    assert max(b - a for a, b in ranges) - min(b - a for a, b in ranges) <= 1
    assert sorted(turned(ranges, rank, 3) for rank in range(parts)) == list(range(parts))


@pytest.mark.parametrize(("heads", "groups", "ranks"), [(9, 3, 2), (9, 3, 4), (8, 1, 3), (8, 8, 3), (9, 3, 9)])
def test_heads_stay_with_their_group(heads: int, groups: int, ranks: int) -> None:
    parts = divide_heads(heads, groups, ranks)
    assert len(parts) == ranks
    assert [head for part in parts for head in range(*part.heads)] == list(range(heads))
    for part in parts:
        assert {head // (heads // groups) for head in range(*part.heads)} == set(range(*part.groups))
        held, keys = part.heads[1] - part.heads[0], part.groups[1] - part.groups[0]
        assert held % keys == 0


def test_too_many_ranks() -> None:
    with pytest.raises(UpcastError, match=r"10 ranks for 9 attention heads; .* Start at most 9 processes"):
        divide_heads(9, 3, 10)


ALONE = """
import sys, weakref
import torch, upcast
from upcast.distributed import join, leave
mesh = join(environ={})
model = upcast.load_litgpt(sys.argv[1], mesh=mesh)
model(torch.arange(5)[None])
process_group = weakref.ref(mesh.get_group())
leave(mesh)
print(process_group())
"""


def test_whoever_leaves_ends_gloo_s_threads(tmp_path: Path, python_with_libraries: Run) -> None:
    folder = write_checkpoint(tmp_path / "model", small_config("pythia-14m"))
    result = python_with_libraries("-c", ALONE, str(folder))  # model and mesh still live
    assert (result.returncode, result.stdout) == (0, "None\n"), result.stderr


@pytest.mark.slow
def test_generate_with_torchrun_and_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", small_config("pythia-14m"))
    asked = ["upcast", "generate", str(folder), "--prompt", "hello", "--max-new-tokens", "12", "--kv-cache", "float32"]
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    outputs = []
    for launcher in (["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]):
        result = subprocess.run(
            [sys.executable, *launcher, *asked],
            env={**clean, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1] != ""
    assert "rank 0 of 2 spent" in result.stderr


def test_the_store_listens_where_the_ranks_meet_and_nowhere_else() -> None:
    """127.0.0.2 leads to this machine as well: what listens at all addresses answers there."""
    place = config.rank_of(rank_environment(0, 2, free_port()))
    store = rendezvous._connect(place, datetime.timedelta(seconds=5))
    with socket.create_connection(("127.0.0.1", place.port), 5), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", place.port), 5)
    other = rendezvous._connect(dataclasses.replace(place, rank=1), datetime.timedelta(seconds=5))
    store.set("a", "b")
    assert other.get("a") == b"b"


def test_a_name_that_leads_elsewhere_has_torch_listen_at_all_addresses() -> None:
    place = config.rank_of(rank_environment(0, 2, 1) | {"MASTER_ADDR": "192.0.2.1"})
    assert rendezvous._listening(place) is None

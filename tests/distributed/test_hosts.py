"""Two hosts: ranks in separate network namespaces agree, and notice when the network between them is cut."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import cost
from benchmarks.harness.namespaces import Host, Link, cut, hosts, latency, why_not
from tests.distributed.test_distributed import ROOT
from tests.litgpt_checkpoints import small_config, write_checkpoint

pytest.importorskip("litgpt")

RANKS, PORT, TIMEOUT = 2, "29511", 2


def start(rank: int, places: tuple[Host, ...], *arguments: str) -> "subprocess.Popen[str]":
    where = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": places[0].address, "MASTER_PORT": PORT}
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": places[rank].interface, "PYTHONPATH": str(ROOT)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*places[rank].prefix, sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **where, **fixed}, **pipes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reason = why_not()
    if reason:
        pytest.skip(f"no network namespaces here: {reason}")
    return write_checkpoint(tmp_path / "model", small_config("pythia-14m"))


@pytest.mark.slow
@pytest.mark.parametrize("link", [Link(rate=2e6), Link(delay=3e-3), Link(rate=2e6, delay=3e-3)], ids=str)
def test_two_hosts_take_the_time_that_the_link_needs(link: Link, folder: Path) -> None:
    if reason := why_not(delay=bool(link.delay)):
        pytest.skip(reason)
    with hosts(link) as places:
        ranks = [
            start(r, places, "benchmarks.harness.distributed_worker", str(folder), "40", "100", "float32")
            for r in range(RANKS)
        ]
        outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    found = json.loads(outputs[0][0])
    config = small_config("pythia-14m")
    shape = cost.Shape("", 0, 0, config.n_layer, config.n_embd, config.padded_vocab_size, sums_per_layer=1)
    # of a step's two messages the first may be on its way already
    least = cost.communication(shape, RANKS, cost.Network(link.rate or float("inf"), link.delay / 2))
    assert found["calls"] == 40 * (cost.collectives(shape) + 1)
    burst = 2 * 16_000 * 8 / link.rate if link.rate and not link.delay else 0.0  # the bucket lets it pass at once
    assert sum(found["collective_samples"]) > 0.5 * (40 * least - burst)


@pytest.mark.slow
def test_a_message_takes_as_long_as_the_link_delays_it() -> None:
    if reason := why_not(delay=True):
        pytest.skip(f"no delay here: {reason}")
    with hosts(Link(delay=2e-3)) as places:
        assert latency(places, 20) >= 2e-3


@pytest.mark.slow
def test_a_cut_in_the_middle_ends_both(folder: Path) -> None:
    command = ("upcast", "generate", str(folder), "--prompt", "a", "--max-new-tokens", "100")
    with hosts(Link(rate=1e5)) as places:  # slow enough to be cut in the middle
        ranks = [start(r, places, *command, "--timeout", str(6 * TIMEOUT)) for r in range(RANKS)]
        for rank in ranks:
            assert rank.stderr is not None
            lines = iter(rank.stderr.readline, "")
            assert any("upcast: GPT" in line for line in lines)  # what is said of the patched model: it is loaded
        cut(places[1])
        for rank, process in enumerate(ranks):
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 2, errors
            assert f"rank {1 - rank}" in errors, errors
            assert "This rank stops as well" in errors, errors


def test_the_model_knows_where_hosts_stop_paying() -> None:
    slow = cost.NETWORKS["1 Gbit/s"]
    shape = cost.SHAPES[0]
    times = [cost.seconds_per_token(shape, ranks, slow) for ranks in cost.HOSTS]
    assert times[0] == pytest.approx(shape.active_bytes / cost.MEMORY_RATE)
    assert min(times) < times[0]
    assert times[-1] > min(times)
    for ranks in cost.HOSTS[1:]:
        assert cost.communication(shape, ranks, slow) > cost.communication(shape, ranks, cost.NETWORKS["100 Gbit/s"])


def test_the_documented_predictions_are_the_models() -> None:
    assert cost.table() in (ROOT / "docs" / "distributed.md").read_text()

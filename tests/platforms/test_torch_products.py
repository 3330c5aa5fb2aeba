"""Macs leave products of many rows to torch, which has a matrix unit to itself: here by a threshold set by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import assert_patched, relative_error, rounded
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast import kernels
from upcast.kernels import native, native_library, portable

pytestmark = pytest.mark.skipif(not native.available(), reason="native kernels")
ROWS = 16
# rows of x -> whether torch multiplies
PRODUCTS = {1: False, 15: False, 16: True, 17: True, 200: True}
MODELS = ["pythia-160m", "SmolLM2-135M-Instruct", "Mixtral-8x7B-v0.1", "Gemma-2-2b"]


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the products that torch got, as on a Mac."""
    assert native_library.torch_rows == native_library.native.tuning()[1]
    monkeypatch.setattr(native_library, "torch_rows", ROWS)
    seen: list[int] = []
    plain = portable.linear

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(x.numel() // x.shape[-1])
        return plain(x, *args)

    monkeypatch.setattr(portable, "linear", watched)
    return seen


@pytest.mark.parametrize("rows", PRODUCTS)
def test_products(by_torch: list[int], rows: int) -> None:
    x, residual = torch.randn(rows, 50), torch.randn(rows, 37)
    weight, bias = torch.randn(37, 50).half(), torch.randn(37)
    wanted = x.double() @ weight.double().t() + bias + residual
    assert relative_error(native.linear(x, weight, bias, residual), wanted) < 1e-6
    assert relative_error(native.matmul(x, weight.t().contiguous(), bias, residual), wanted) < 1e-6
    experts, counts = torch.randn(2, 37, 50).half(), torch.tensor([rows, rows])
    wanted = torch.cat([x.double() @ expert.double().t() for expert in experts])
    assert relative_error(native.grouped_linear(torch.cat([x, x]), experts, counts), wanted) < 1e-6
    assert by_torch == ([rows] * 4 if PRODUCTS[rows] else [])


@pytest.mark.parametrize("shape", [(0, 50), (4, 0, 50), (3, 0)], ids=str)
def test_nothing_to_multiply(by_torch: list[int], shape: tuple[int, ...]) -> None:
    weight = torch.randn(7, shape[-1]).half()
    assert native.linear(torch.randn(shape), weight).equal(torch.zeros(*shape[:-1], 7))


@pytest.mark.parametrize("name", MODELS)
def test_litgpt_fills_its_cache_by_torch_and_decodes_natively(by_torch: list[int], tmp_path: Path, name: str) -> None:
    pytest.importorskip("litgpt")
    model = upcast.load_litgpt(write_checkpoint(tmp_path / "checkpoint", small_config(name)))
    assert_patched(model)
    prompt = torch.arange(ROWS).view(1, ROWS) * 7
    logits, counted = [], []
    for threshold in (0, ROWS):
        native_library.torch_rows = threshold  # type: ignore[misc] # the fixture puts it back
        by_torch.clear()
        model.set_kv_cache(1)
        with torch.inference_mode():
            steps = [model(prompt, torch.arange(ROWS))]
            counted.append(len(by_torch))
            steps += [model(torch.tensor([[n]]), torch.tensor([ROWS + n])) for n in range(3)]
        logits.append(torch.cat([step[:, -1] for step in steps]))
        assert len(by_torch) == counted[-1]  # no token went there
    assert counted[0] == 0 < counted[1]
    assert relative_error(logits[1], logits[0]) < 1e-5


def test_any_module(by_torch: list[int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    x, wanted = torch.randn(20, 32), rounded(model)
    upcast.patch(model)
    with torch.inference_mode():
        assert relative_error(model(x), wanted(x)) < 1e-6
        assert relative_error(model(x[:3]), wanted(x[:3])) < 1e-6
    assert by_torch == [20, 20]
    assert kernels.active() is native

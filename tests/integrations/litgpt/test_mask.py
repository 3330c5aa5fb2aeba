"""LitGPT's causal mask without memory: the same rows, the same errors, and a real mask as soon as one is needed."""

import copy
import pickle
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import relative_error
from tests.litgpt_checkpoints import small_config
from upcast.integrations.litgpt.causal_mask import CausalMask

pytest.importorskip("litgpt")

POSITIONS = [[0], [6], [2, 3, 4], [5, 0]]


def model_of(name: str = "SmolLM2-135M-Instruct", **changes: Any) -> Any:
    from litgpt import GPT

    torch.manual_seed(0)
    return upcast.patch(GPT(small_config(name, **changes)).eval(), kv_cache="float32")


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_rows_are_litgpt_s(positions: list[int]) -> None:
    from litgpt.model import batched_index_select, build_mask_cache

    mask, theirs = CausalMask(7), build_mask_cache(7)
    chosen = torch.tensor(positions, dtype=torch.int64)
    assert torch.equal(mask.index_select(2, chosen), theirs.index_select(2, chosen))
    batched = torch.stack([chosen, chosen])
    assert torch.equal(batched_index_select(mask, 2, batched), batched_index_select(theirs, 2, batched))
    assert mask.imagined
    assert torch.equal(mask, theirs)
    assert not mask.imagined


@pytest.mark.parametrize("position", [-1, 7])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        CausalMask(7).index_select(2, torch.tensor([position]))


def test_a_long_context_takes_no_memory() -> None:
    model = model_of(block_size=2**20)
    model.set_kv_cache(1, 2**20)  # a mask of 2^40 booleans would be a terabyte
    for positions in (torch.arange(5), torch.tensor([5])):
        logits = model(torch.ones(1, len(positions), dtype=torch.int64), positions, input_pos_maxp1=6)
        assert logits.isfinite().all()
    assert model.mask_cache.imagined
    assert model.mask_cache.shape == (1, 1, 2**20, 2**20)


def test_under_hooks_litgpt_s_own_forward_reads_the_rows() -> None:
    model, tokens, positions = model_of(), torch.arange(6)[None], torch.arange(6)
    model.set_kv_cache(1, 16)
    fused = model(tokens, positions)
    seen: list[tuple[int, ...]] = []
    model.transformer.h[0].attn.register_forward_hook(lambda module, args, out: seen.append(args[3].shape))
    assert relative_error(model(tokens, positions), fused) < 1e-5
    assert seen == [(1, 1, 6, 16)]
    assert model.mask_cache.imagined


def test_writing_into_the_mask_counts() -> None:
    mask = CausalMask(5)
    mask[:, :, :, 2] = False
    assert not mask[0, 0, :, 2].any()
    assert not mask.index_select(2, torch.tensor([4]))[..., 2].any()
    assert mask.index_select(2, torch.tensor([4]))[..., 1].all()


def test_copies_are_as_long_and_as_real() -> None:
    mask = CausalMask(5)
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin.imagined
        twin[..., 0, 0] = False
        assert mask.imagined
        assert not copy.deepcopy(twin)[0, 0, 0, 0]


def test_unpatch_leaves_an_ordinary_mask() -> None:
    from litgpt.model import build_mask_cache

    model = model_of()
    model.set_kv_cache(1, 16)
    before = model.mask_cache
    model.set_kv_cache(2, 16)
    assert model.mask_cache is before
    upcast.unpatch(model)
    assert type(model.mask_cache) is torch.Tensor
    assert torch.equal(model.mask_cache, build_mask_cache(16))
    assert "set_kv_cache" not in model.__dict__


def test_a_failed_set_kv_cache_changes_nothing() -> None:
    model = model_of()
    with pytest.raises(RuntimeError):
        model.set_kv_cache(-1, 16)
    assert model.mask_cache is None

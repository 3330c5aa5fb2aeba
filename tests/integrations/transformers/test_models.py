"""Transformers: tiny models of every kind against float32 on the same rounded weights, and UPCAST=1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched, fallbacks, relative_error, rounded
from tests.transformers_models import FAMILIES, IDS, MOE, PIXELS, TEXT, TOKENS, first_output, make
from upcast.integrations import loading

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "config", "sizes", "inputs"), [pytest.param(*row, id=row[0]) for row in FAMILIES])
def test_output_equals_float32(
    kind: str, config: str, sizes: dict[str, Any], inputs: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    model = make(kind, config, sizes)
    want = first_output(rounded(model), inputs)
    if dtype == torch.float16:
        model.half()
        # a model cast whole has rounded vectors and buffers too: that is the reference then
        want = first_output(_upcast(model), inputs)
    upcast.patch(model)
    assert_patched(model)
    assert model.dtype == torch.float32
    got = first_output(model, inputs)
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-5
    large = {name: size for name, size in fallbacks(model).largest.items() if size > 4 << 20}
    assert not large


def _upcast(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).float()


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM", "MixtralForCausalLM", "MambaForCausalLM"])
def test_generate_gives_the_same_tokens(kind: str) -> None:
    row = next(row for row in FAMILIES if row[0] == kind)
    model = make(*row[:3])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    want = rounded(model).generate(IDS, **options)
    upcast.patch(model)
    assert torch.equal(model.generate(IDS, **options), want)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_widen_only_what_they_use(implementation: str) -> None:
    model = make("MixtralForCausalLM", "MixtralConfig", {**TEXT, **MOE})
    model.set_experts_implementation(implementation)
    want = first_output(rounded(model), TOKENS)
    upcast.patch(model)
    assert relative_error(first_output(model, TOKENS), want) < 1e-5
    assert fallbacks(model).calls == {}


def test_float16_inputs_are_accepted() -> None:
    model = make("ViTModel", "ViTConfig", {**TEXT, "image_size": 32, "patch_size": 8})
    upcast.patch(model)
    got = model(pixel_values=PIXELS["pixel_values"].half())[0]
    assert got.dtype == torch.float32


# --- UPCAST=1 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[torch.dtype], Path]:
    def write(dtype: torch.dtype) -> Path:
        model = make("LlamaForCausalLM", "LlamaConfig", TEXT)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.fill_(200.0)
            model.model.layers[1].mlp.up_proj.weight.fill_(20.0)
            model.model.layers[1].mlp.gate_proj.weight.fill_(20.0)
            model.model.layers[1].post_attention_layernorm.weight.fill_(20.0)
        model.to(dtype).save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    return write


LOAD = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("llama")
logits = model(torch.arange(3, 17).view(2, 7)).logits
print(model.lm_head.weight.__class__.__name__, logits.dtype, bool(torch.isfinite(logits).all()))
"""


def test_plain_loading_goes_wrong_and_upcast_goes_right(checkpoint: Any, python_with_libraries: Run) -> None:
    checkpoint(torch.float16)
    loading_information = LOAD.replace('("llama")', '("llama", output_loading_info=True)[0]')
    plain, patched = (
        python_with_libraries("-c", LOAD),
        python_with_libraries("-c", LOAD + loading_information, UPCAST="1"),
    )
    assert plain.stdout.split() == ["Parameter", "torch.float16", "False"], plain.stderr
    assert patched.stdout.split() == ["HalfWeight", "torch.float32", "True"] * 2, patched.stderr
    assert patched.stderr.count("upcast: LlamaForCausalLM") == 2


def test_other_devices_are_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCAST", "1")
    with torch.device("meta"):
        model = make("LlamaForCausalLM", "LlamaConfig", TEXT)
    load = loading.hook(lambda wrapped, args, kwargs: wrapped())
    assert load(lambda: model, type(model), (), {}) is model
    assert "LlamaForCausalLM runs as it is, unpatched: " in capsys.readouterr().err
    assert type(model.lm_head.weight) is torch.nn.Parameter

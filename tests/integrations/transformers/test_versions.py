"""What holds under every version of Transformers from 4.51 on; `make test-versions` runs these with older ones.

Written with what all versions have: configs, from_pretrained under UPCAST=1, generate, and the loss.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from tests.transformers_models import FAMILIES, IDS, MOE, TEXT, TOKENS, first_output, make

transformers = pytest.importorskip("transformers")
pytestmark = [  # slow: under the version of constraints.txt other tests say the same, and more
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other versions warn of other things
]

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**TEXT, "head_dim": 8}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": None}),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**TEXT, "head_dim": 8, "sliding_window": 5}),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**TEXT, **MOE}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
FORMATS: dict[str, dict[str, Any]] = {
    "single": {},
    "sharded": {"max_shard_size": "20KB"},
    "bin": {"safe_serialization": False},
}
FIFTH = int(version("transformers").split(".")[0]) >= 5


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in FAMILIES])
def test_forward(row: Any) -> None:
    kind, config, sizes, inputs = row
    if not hasattr(transformers, kind):
        pytest.skip(f"Transformers {version('transformers')} has no {kind}")
    model = make(kind, config, sizes)
    want = first_output(rounded(model), inputs)
    upcast.patch(model)
    assert_patched(model)
    assert relative_error(first_output(model, inputs), want) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind: str, way: str, attention: str) -> None:
    name, config, sizes = KINDS[kind]
    model = make(name, config, {**sizes, "attn_implementation": attention})
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    kinds = {"return_dict_in_generate": True, "output_logits": True}
    options = {"attention_mask": torch.ones_like(IDS), **fixed, **kinds, **WAYS[way]}
    try:
        want = torch.stack(rounded(model).generate(IDS, **options).logits)
    except (ValueError, RuntimeError) as error:
        if FIFTH:
            raise
        pytest.skip(f"Transformers {version('transformers')} does not do it in float32: {error}")
    got = torch.stack(upcast.patch(model).generate(IDS, **options).logits)
    assert relative_error(got, want) < 1e-3


def test_a_token_runs_in_one_call_or_the_plan_says_why() -> None:
    from upcast.core import forward_override

    model = make(*KINDS["Llama"])
    plan = str(upcast.plan(model))
    upcast.patch(model)
    with torch.inference_mode():
        model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    calls = getattr(forward_override.in_effect(model.model.layers[0]), "calls", 0)
    assert (calls > 0) != ("not fused" in plan), plan


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, form: str) -> None:
    from upcast.integrations.transformers import load as ours

    if form == "bin" and FIFTH:
        pytest.skip("Transformers 5 writes safetensors only; tests/test_loading.py writes .bin itself")
    name, config, sizes = KINDS[kind]
    source = make(name, config, sizes).to(dtype)
    source.save_pretrained(tmp_path, **FORMATS[form])
    ours.install()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert not half_weights(plain)
    monkeypatch.setenv("UPCAST", "1")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_patched(model)
    assert model.dtype == torch.float32
    assert relative_error(first_output(model, TOKENS), first_output(rounded(plain), TOKENS)) < 1e-5


REFUSED = [
    ({"torch_dtype": torch.float64}, "dtype=torch.float64"),
    ({"device_map": "meta"}, "device_map='meta'"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_refused(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    make("LlamaForCausalLM", "LlamaConfig", TEXT).half().save_pretrained(tmp_path)
    with pytest.raises(upcast.UpcastError, match="Leave it out") as caught:
        upcast.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    grads = []
    for patched in (False, True):
        model = make("LlamaForCausalLM", "LlamaConfig", TEXT)
        model = upcast.patch(model) if patched else rounded(model)
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.model.norm.weight.grad)
    assert relative_error(grads[1], grads[0]) < 1e-5


def test_outputs_of_every_layer() -> None:
    model = make("LlamaForCausalLM", "LlamaConfig", {**TEXT, "attn_implementation": "eager"})
    results = []
    for each in (rounded(model), upcast.patch(model)):
        with torch.inference_mode():
            output = each(IDS, output_attentions=True, output_hidden_states=True)
        results.append([*output.attentions, *output.hidden_states])
    assert len(results[0]) == len(results[1]) == 5
    assert all(relative_error(got, want) < 1e-5 for want, got in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_quantization_config_and_what_it_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make(*KINDS["Llama"]).to(dtype)
    source.save_pretrained(tmp_path / "a")
    auto = transformers.AutoModelForCausalLM
    got = auto.from_pretrained(tmp_path / "a", quantization_config=upcast.UpcastConfig()).eval()
    assert_patched(got)
    got.save_pretrained(tmp_path / "b")
    again = auto.from_pretrained(tmp_path / "b").eval()
    assert_patched(again)
    want = first_output(rounded(source), TOKENS)
    assert relative_error(first_output(got, TOKENS), want) < 1e-5
    assert relative_error(first_output(again, TOKENS), want) < 1e-5

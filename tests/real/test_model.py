"""The promises on SmolLM2-135M-Instruct with its real weights."""

import copy
import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, address, assert_patched, fallbacks, half_weights, relative_error
from tests.integrations.litgpt.test_models import float32_model
from tests.peak_memory import peaks

pytestmark = pytest.mark.real

SCALES = [*(pytest.param(scale, marks=pytest.mark.slow) for scale in (4, 64, 1024)), 4096]
DTYPES = (torch.bfloat16, torch.float32)
TEXT = " ".join(pydoc_data.topics.topics["assert"].split())


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> torch.Tensor:
    from litgpt import Tokenizer

    return Tokenizer(smollm2).encode(TEXT)[:128].long()


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    return float32_model(smollm2)


@pytest.fixture
def model(smollm2: Path) -> Any:
    return upcast.load_litgpt(smollm2)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens[None])


def stressed(smollm2: Path, scale: int) -> Any:
    """The exact stress test: activations grow by ``scale``, and in float32 no bit of the logits changes."""
    from litgpt import GPT, Config

    from benchmarks.harness.stress import stress, stress_eps

    model = GPT(Config.from_file(smollm2 / "model_config.yaml")).eval()
    model.load_state_dict(stress(torch.load(smollm2 / "lit_model.pth"), scale), assign=True)
    stress_eps(model, scale)
    return model


def test_logits_and_weight_bytes(model: Any, reference: Any, tokens: torch.Tensor) -> None:
    assert_patched(model)
    got = logits(model, tokens)
    assert got.dtype == torch.float32
    assert relative_error(got, logits(reference, tokens)) < 1e-5
    assert fallbacks(model).calls == {}
    plan = upcast.patching.engine.record_of(model).plan
    float32 = sum(p.nbytes for p in reference.parameters())
    assert plan.bytes_after <= 0.415 * float32  # lm_head and wte share one storage
    distinct = {address(w): w.nbytes for w in half_weights(model).values()}
    assert sum(distinct.values()) <= plan.bytes_after


def test_without_sharing_twins_it_is_half(reference: Any, model: Any) -> None:
    stored = sum(weight.nbytes for weight in half_weights(model).values())
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, upcast.HalfWeight))
    assert stored + rest <= 0.502 * sum(p.nbytes for p in reference.parameters())


@pytest.mark.parametrize("scale", SCALES)
def test_the_stress_test_breaks_float16_and_not_upcast(
    smollm2: Path, reference: Any, tokens: torch.Tensor, scale: int
) -> None:
    model = stressed(smollm2, scale)
    assert not torch.isfinite(logits(copy.deepcopy(model).half(), tokens[:32])).all()
    upcast.patch(model)
    assert_patched(model)
    got = logits(model, tokens)
    assert torch.isfinite(got).all()
    assert relative_error(got, logits(reference, tokens)) < 1e-5


def test_greedy_text_is_float32_s(model: Any, reference: Any, smollm2: Path) -> None:
    from litgpt import Tokenizer
    from litgpt.generate.base import generate
    from litgpt.prompts import load_prompt_style

    prompt = Tokenizer(smollm2).encode(load_prompt_style(smollm2).apply("What do llamas eat?")).long()
    texts, options = [], {"temperature": 0.0, "include_prompt": False}
    for each in (model, reference):
        with torch.inference_mode():
            each.set_kv_cache(batch_size=1, max_seq_length=len(prompt) + 40)
            texts.append(generate(each, prompt, max_returned_tokens=len(prompt) + 40, **options).tolist())
            each.clear_kv_cache()
    assert len(texts[0]) == 40
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtypes", [DTYPES[:1], pytest.param(DTYPES, marks=pytest.mark.slow)], ids=len)
def test_peak_memory_of_loading(smollm2: Path, tmp_path: Path, python: Run, dtypes: tuple[torch.dtype, ...]) -> None:
    state = torch.load(smollm2 / "lit_model.pth", mmap=True)
    largest = max(tensor.numel() for tensor in state.values())
    weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in state.values()}.values())
    size = (smollm2 / "lit_model.pth").stat().st_size
    allowed = {smollm2: size + 150e6}
    for dtype in dtypes:
        folder = tmp_path / str(dtype)
        folder.mkdir()
        torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, folder / "lit_model.pth")
        (folder / "model_config.yaml").write_text((smollm2 / "model_config.yaml").read_text())
        allowed[folder] = size + largest * dtype.itemsize + 150e6
    grown = peaks(python, "import litgpt, lightning, upcast", "upcast.load_litgpt(folder)", allowed)
    for most, peak in zip(allowed.values(), grown, strict=True):
        assert weights * 0.9 < peak < most, grown


TOPICS = (
    *("assert", "break", "class", "comparisons", "continue", "customization", "del", "dynamic-features", "else"),
    *("exceptions", "exprlists", "for", "function", "global", "if", "import", "lambda", "lists", "return", "while"),
)


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int = 200) -> list[int]:
    from litgpt.generate.base import generate

    total = len(prompt) + new_tokens
    model.clear_kv_cache()
    model.set_kv_cache(batch_size=1, max_seq_length=total)
    answer = generate(model, prompt, total, temperature=0.0, include_prompt=False, eos_id=None)
    model.clear_kv_cache()
    return answer.tolist()


@pytest.mark.slow
def test_two_hundred_greedy_tokens_on_twenty_prompts(smollm2: Path, reference: Any) -> None:
    """All equal to float32's with a float32 cache, at least 19 of 20 with a float16 cache."""
    from litgpt import Tokenizer

    tokenizer = Tokenizer(smollm2)
    prompts = [tokenizer.encode(" ".join(pydoc_data.topics.topics[topic].split()))[:64].long() for topic in TOPICS]
    assert len(prompts) == 20
    expected = [greedy(reference, prompt) for prompt in prompts]
    equal = {}
    for kv_cache in ("float32", "float16"):
        model = upcast.load_litgpt(smollm2, kv_cache=kv_cache)
        assert_patched(model)
        equal[kv_cache] = sum(greedy(model, p) == tokens for p, tokens in zip(prompts, expected, strict=True))
    assert equal["float32"] == 20
    assert equal["float16"] >= 19

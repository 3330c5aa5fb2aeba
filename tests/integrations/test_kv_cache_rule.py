"""What a float16 KV cache costs: at most 1e-3 of the logits, or the layer goes to float32 and says so.

Keys and values of every size are planted, and the default cache is compared with a float32 cache of the same patched
model. The models' weights are random and of unit scale: such models feel rounded keys more than trained ones do.
"""

import copy
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, relative_error
from tests.fused_models import make as litgpt_model
from tests.fused_models import modules_only
from tests.integrations.transformers.test_cache import KINDS
from tests.transformers_models import MOE, TEXT
from tests.transformers_models import make as transformers_model

LITGPT = ["pythia-14m", "Llama-3.2-1B", "Mathstral-7B-v0.1", "Gemma-2b", "Gemma-2-2b", "Gemma-3-1b-it", "Qwen2.5-0.5B"]
HEADS = {**TEXT, "head_dim": 8}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPTNeoX": KINDS["one head each"],
    "Llama": KINDS["grouped heads"],
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {**TEXT, "sliding_window": 6}),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**HEADS, "sliding_window": 6}),
    "GptOss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**HEADS, **MOE, "attn_implementation": "eager"},
    ),
    "DeepseekV3": KINDS["latent"],
}
# What of the projection is planted; the size; whether all layers, none of them, or any number go to float32.
PLANTED: list[tuple[str, str, float, str]] = [
    ("keys", "weight", 1, "none"),
    ("keys", "weight", 2.5, "any"),
    ("keys", "weight", 10, "all"),
    ("keys", "bias", 3, "any"),
    ("keys", "bias", 100, "all"),
    ("keys", "bias", 20000, "all"),
    ("values", "weight", 4, "any"),
    ("values", "weight", 60, "all"),
    ("values", "bias", 1, "none"),
    ("values", "bias", 20000, "all"),
]
PROMPT, LENGTH = 12, 28
Run = Callable[[Any], tuple[Tensor, list[bool]]]  # gives logits, and which layers went to float32
CHUNKS = [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]
IDS = torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
cases = pytest.mark.parametrize(
    ("which", "how", "size", "wide"), [pytest.param(*row, id=" ".join(map(str, row[:3]))) for row in PLANTED]
)


def lively(model: nn.Module) -> nn.Module:
    """Give every matrix the scale that keeps vectors as large as they were."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.0 if "wte" in name or "embed" in name else parameter.shape[-1] ** -0.5)
    return model


def rows_of(name: str, module: Any, attn: Any, which: str) -> Tensor | None:
    """Return which rows of a projection make keys or values; None if it makes neither."""
    leaf, number = name.rpartition(".")[2], ["queries", "keys", "values"].index(which)
    count = module.weight.shape[0] if isinstance(module, nn.Linear) else 0
    if leaf == f"{which[0]}_proj":
        return torch.arange(count)
    if leaf == "qkv":  # LitGPT: all queries, all keys, all values
        sizes = [each * attn.config.head_size for each in (attn.config.n_head, attn.config.n_query_groups)]
        return torch.arange(count).split([*sizes, sizes[1]])[number]
    if leaf == "query_key_value":  # GPTNeoX: of each head
        return torch.arange(count).view(TEXT["num_attention_heads"], 3, -1)[:, number].flatten()
    if leaf == "kv_b_proj":  # DeepSeek: of each head what is not turned, then values
        return torch.arange(count).view(TEXT["num_attention_heads"], -1).split((8, 4), dim=1)[number - 1].flatten()
    return None


def plant(model: nn.Module, which: str, how: str, size: float) -> nn.Module:
    """Make keys or values of every layer ``size`` times as large, or add a bias of that standard deviation."""
    modules, found = dict(model.named_modules()), 0
    torch.manual_seed(3)
    with torch.no_grad():
        for name, module in modules.items():
            if which == "keys" and name.endswith(("norm_k", "k_norm")) and not isinstance(module, nn.Identity):
                offset = 1.0 if "Gemma3" in type(module).__name__ or getattr(module, "add_unit_offset", False) else 0.0
                module.weight.add_(offset).mul_(size if how == "weight" else size / module.weight.norm()).sub_(offset)
            rows = rows_of(name, module, modules.get(name.rpartition(".")[0]), which)
            if rows is None:
                continue
            found += 1
            if how == "weight":
                module.weight[rows] *= size
                continue
            if module.bias is None:
                module.bias = nn.Parameter(torch.zeros(module.weight.shape[0]))
            module.bias[rows] = torch.randn(len(rows)) * size
    assert found
    return model


def check(
    model: nn.Module, run: Callable[[Any], tuple[Tensor, list[bool]]], wide: str, said: Callable[[], str]
) -> None:
    """Compare the default cache with a float32 cache; ``run`` returns logits, and which layers went to float32."""
    exact, _ = run(upcast.patch(copy.deepcopy(model), kv_cache="float32"))
    upcast.patch(model)
    assert_patched(model)
    said()
    got, layers = run(model)
    assert exact.isfinite().all()
    assert relative_error(got[:, PROMPT:], exact[:, PROMPT:]) <= 1e-3
    assert wide == "any" or set(layers) == {wide == "all"}
    run(model)  # with new caches
    assert said().count("float32: its keys or values are too large") == sum(layers)


def decoded(model: Any, ids: Tensor = IDS, *, alike: bool = True) -> tuple[Tensor, list[bool]]:
    """Run LitGPT's model over a prompt, and then token by token; positions for each row run LitGPT's own forwards."""
    model.set_kv_cache(2, LENGTH)
    with torch.inference_mode():
        runs = [torch.arange(begin, end) if alike else torch.arange(begin, end).repeat(2, 1) for begin, end in CHUNKS]
        logits = [model(ids[:, run.flatten()[0] : run.flatten()[-1] + 1], run) for run in runs]
    return torch.cat(logits, dim=1), [block.attn.kv_cache.k.dtype == torch.float32 for block in model.transformer.h]


@cases
@pytest.mark.parametrize("name", LITGPT)
def test_litgpt(name: str, which: str, how: str, size: float, wide: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = plant(lively(litgpt_model(name)), which, how, size)
    check(model, decoded, wide, lambda: capsys.readouterr().err)


@cases
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers(
    family: str, which: str, how: str, size: float, wide: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")

    def run(model: Any) -> tuple[Tensor, list[bool]]:
        cache = transformers.DynamicCache(config=model.config)
        with torch.inference_mode():
            logits = [model(IDS[:, begin:end], past_key_values=cache).logits for begin, end in CHUNKS]
        return torch.cat(logits, dim=1), [not isinstance(layer.keys, upcast.HalfWeight) for layer in cache.layers]

    model = plant(lively(transformers_model(*TRANSFORMERS[family])), which, how, size)
    check(model, run, wide, lambda: capsys.readouterr().err)


# --- where it is met --------------------------------------------------------------------------------------------------

LARGE = 77  # a token whose keys are large in the first layer; no other's are
WAYS: dict[str, Callable[..., Any]] = {
    "one call": decoded,
    "modules": lambda model, ids: decoded(modules_only(model), ids),
    "LitGPT's own": lambda model, ids: decoded(model, ids, alike=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_large_key_while_decoding_widens_what_is_stored(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = lively(litgpt_model("Llama-3.2-1B"))
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wte.weight[LARGE, 0] = 30
        attn = model.transformer.h[0].attn
        attn.qkv.weight[attn.config.n_head * attn.config.head_size :, 0] = 3
    ids = IDS.masked_fill(IDS == LARGE, 5)
    ids[1, PROMPT + 4] = LARGE
    exact, _ = decoded(upcast.patch(copy.deepcopy(model), kv_cache="float32"), ids)
    got, wide = WAYS[way](upcast.patch(model), ids)
    assert relative_error(got, exact) < 1e-3
    assert wide == [True, False, False]
    assert capsys.readouterr().err.count("the KV cache of layer 0 goes to float32") == 1


def biased(family: str, model: Any) -> Any:
    """Give the keys of layer 1 alone a large bias."""
    plant(model.gpt_neox.layers[1] if family == "GPTNeoX" else model.model.layers[1], "keys", "bias", 100)
    return model


def generated(model: Any, **options: Any) -> tuple[Tensor, Any]:
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    kinds = {"return_dict_in_generate": True, "output_logits": True, "attention_mask": torch.ones_like(IDS)}
    result = model.generate(IDS, **fixed, **kinds, **options)
    return torch.stack(result.logits), result.past_key_values


def by_hand(model: Any) -> tuple[Tensor, Any]:
    """The model makes its cache itself, in float32; it is downcast with the next token."""
    with torch.no_grad():
        output, logits = model(IDS, use_cache=True), []
        for column in range(5):
            output = model(IDS[:, column : column + 1], past_key_values=output.past_key_values)
            logits.append(output.logits)
    return torch.cat(logits, dim=1), output.past_key_values


CACHES: dict[str, Callable[[Any], tuple[Tensor, Any]]] = {
    "dynamic": generated,
    "static": lambda model: generated(model, cache_implementation="static", disable_compile=True),
    "beams": lambda model: generated(model, num_beams=2),
    "by hand": by_hand,
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["GPTNeoX", "Llama"])
def test_one_layer_goes_to_float32_in_every_cache(family: str, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = biased(family, lively(transformers_model(*TRANSFORMERS[family])))
    exact, _ = CACHES[cache](upcast.patch(copy.deepcopy(model), kv_cache="float32"))
    upcast.patch(model)
    for _ in range(2):
        got, held = CACHES[cache](model)
        assert relative_error(got, exact) < 1e-3
        assert [type(layer.keys).__name__ for layer in held.layers] == ["HalfWeight", "Tensor"]
    said = capsys.readouterr().err
    assert said.count("the KV cache of layer 1") == said.count("float32: its keys or values are too large") == 1


@pytest.mark.real
def test_the_real_model_s_caches_stay_float16(smollm2: Path) -> None:
    from litgpt import Tokenizer

    exact, model = (upcast.load_litgpt(smollm2, kv_cache=kind) for kind in ("float32", "float16"))
    text = " ".join(" ".join(pydoc_data.topics.topics[topic].split()) for topic in ("class", "import", "assert"))
    ids, logits = Tokenizer(smollm2).encode(text)[:300].long()[None], []
    for each in (model, exact):
        each.set_kv_cache(1, 300)
        with torch.inference_mode():
            each(ids[:, :280], torch.arange(280))
            logits.append(torch.cat([each(ids[:, i : i + 1], torch.tensor([i])) for i in range(280, 300)]))
    assert relative_error(*logits) < 4e-4
    assert {block.attn.kv_cache.k.dtype for block in model.transformer.h} == {torch.float16}

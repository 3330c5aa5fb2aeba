"""Pieces of patched models used by themselves, and surgery on models of Transformers, PEFT and LitGPT."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error, rounded
from tests.litgpt_checkpoints import small_config
from tests.patching.test_surgery import IDS, Net, Wrapper, pair, same, seeded, tied
from upcast.tensor.half_weight import HalfWeight

# --- a piece of a patched model -----------------------------------------------------------------------------------

PIECES: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda m: m.head,
    "a list": lambda m: m.blocks,
    "a container of parts": lambda m: nn.Sequential(*list(m.blocks), m.head),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_is_reported_and_unpatched(piece: str, dtype: torch.dtype) -> None:
    model = upcast.patch(Net().eval().to(dtype))
    inside = PIECES[piece](model)
    with torch.no_grad():
        want = model(IDS)
    assert "a piece of a patched Net" in upcast.report(inside)
    with pytest.raises(upcast.UpcastError, match="unpatch the piece"):
        upcast.patch(inside)
    upcast.unpatch(inside)
    weights = [each for each in inside.parameters() if each.dim() > 1]
    assert all(type(each) is nn.Parameter and each.dtype == dtype for each in weights)
    assert type(model.embedding.weight) is HalfWeight
    if dtype == torch.float32:  # else it is half of one and half of the other, as without us
        same(model, model)
        with torch.no_grad():
            assert relative_error(model(IDS), want) < 1e-5
    upcast.patch(inside)  # by itself now
    assert any(isinstance(each, HalfWeight) for each in inside.parameters())
    upcast.unpatch(inside)
    upcast.unpatch(model)
    assert {each.dtype for each in model.parameters() if each.dim() > 1} == {dtype}


def test_a_piece_keeps_its_ties_and_outlives_the_model() -> None:
    plain, patched = pair()
    for model in (plain, patched):
        tied(model)
    head = nn.Sequential(patched.head)
    upcast.unpatch(head)
    assert patched.head.weight is patched.embedding.weight
    same(plain, patched)
    blocks = nn.Sequential(*patched.blocks)
    want = nn.Sequential(*plain.blocks)(x := seeded((2, 6, 16)))
    del patched, head
    with torch.no_grad():
        assert relative_error(blocks(x), want) < 1e-5
    assert "2 weights stored so" in upcast.report(blocks[0])
    upcast.unpatch(blocks)
    assert relative_error(blocks(x), want) < 1e-5
    assert "forward" not in blocks[0].up.__dict__


# --- Transformers, PEFT and LitGPT --------------------------------------------------------------------------------

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
OPT = {"vocab_size": 50, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "num_key_value_heads": 2}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, "num_key_value_heads": 2, "num_local_experts": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**OPT, "word_embed_proj_dim": 32}),
}
TOKENS = torch.arange(3, 11)[None]


def family(name: str, **changes: Any) -> tuple[Any, Any]:
    """Return (rounded, patched) of a small model of Transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind, config, sizes = FAMILIES[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **changes)).eval()
    return rounded(model), upcast.patch(model, kv_cache="float32")


def logits(model: Any) -> Tensor:
    extra = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, **extra).logits
    return found


@pytest.mark.parametrize("size", [60, 40])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "not tied"])
@pytest.mark.parametrize("name", FAMILIES)
def test_token_embeddings_are_resized(name: str, tie: bool, size: int) -> None:
    plain, patched = family(name, tie_word_embeddings=tie)
    for model in (plain, patched):
        torch.manual_seed(1)
        model.resize_token_embeddings(size, mean_resizing=False)
    want, got = logits(plain)[..., :50], logits(patched)[..., :50]  # the new rows are drawn at random
    assert relative_error(got, want) < 1e-5
    ties = [model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (plain, patched)]
    assert ties[0] == ties[1]
    assert patched.get_input_embeddings().weight.shape == (size, 32)
    assert any(isinstance(each, HalfWeight) for each in patched.parameters())
    assert relative_error(logits(upcast.unpatch(patched))[..., :50], want) < 1e-5


def test_textual_inversion() -> None:
    """A new token's row learns, the others are put back after each step."""
    losses = []
    for model in family("llama"):
        torch.manual_seed(1)
        model.resize_token_embeddings(51, mean_resizing=False)
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            table[50] = seeded((32,))
        before = table.detach().clone()
        model.requires_grad_(False)
        table.requires_grad_(True)
        optimizer = torch.optim.SGD([table], lr=0.5)
        found = []
        for _ in range(3):
            loss = model(input_ids=torch.tensor([[50, 3, 4]]), labels=torch.tensor([[50, 3, 4]])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                table[:50] = before[:50]
            found.append(float(loss.detach()))
        losses.append(found)
    assert losses[0][0] != losses[0][2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def decoded(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=TOKENS, use_cache=True)
        rows = [found.logits[:, -1]]
        for token in range(3):
            found = model(input_ids=torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True)
            rows.append(found.logits[:, -1])
        return torch.stack(rows)


def litgpt_decoded(model: Any) -> Tensor:
    with torch.no_grad():
        model.set_kv_cache(1)
        rows = [model(TOKENS, torch.arange(8))[:, -1]]
        rows += [model(torch.tensor([[token]]), torch.tensor([8 + token]))[:, -1] for token in range(3)]
        model.clear_kv_cache()
        return torch.stack(rows)


def put(model: nn.Module, name: str, change: Callable[[Any], Any]) -> None:
    """Replace a module of ``model`` by what ``change`` makes of it."""
    path, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    owner._modules[last] = change(owner._modules[last])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "wrapped": Wrapper,
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "copied": copy.copy,
    "deep copied": copy.deepcopy,
}
NORMS = ("model.layers.0.input_layernorm", "model.norm", "transformer.h.0.norm_1", "transformer.ln_f")
INSIDE = {
    "llama": [*(f"model.layers.0.{each}" for each in ("self_attn", "mlp", "self_attn.q_proj", "input_layernorm"))],
    "litgpt": [*(f"transformer.h.0.{each}" for each in ("attn", "mlp", "attn.qkv", "norm_1"))],
}
INSIDE["llama"] += ["model.layers.0", "model.norm", "lm_head"]
INSIDE["litgpt"] += ["transformer.h.0", "transformer.ln_f", "lm_head"]
# Of other modules than norms, the unpatched model does not run with a half, either.
ROWS = [
    (library, name, change)
    for library, names in INSIDE.items()
    for name in names
    for change in CHANGES
    if change not in ("half", "bfloat16") or name in NORMS
]


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "after a token"])
@pytest.mark.parametrize(("library", "name", "change"), ROWS)
def test_a_replaced_module_decodes_as_unpatched(library: str, name: str, change: str, warm: bool) -> None:
    if library == "llama":
        plain, patched = family("llama")
        run = decoded
    else:
        litgpt = pytest.importorskip("litgpt")
        torch.manual_seed(0)
        model = litgpt.GPT(small_config("Llama-3.2-1B")).eval()
        plain, patched = rounded(model), upcast.patch(model, kv_cache="float32")
        cached = change != "wrapped" or name not in ("transformer.h.0", "transformer.h.0.attn")
        run = litgpt_decoded if cached else lambda model: model(TOKENS).detach()  # LitGPT finds no cache in a wrapper
    if warm:
        run(patched)
    for model in (plain, patched):
        put(model, name, CHANGES[change])
    assert relative_error(run(patched), run(plain)) < 1e-5


def test_peft_adapts_parameters_by_their_names() -> None:
    peft = pytest.importorskip("peft")
    outputs = []
    for model in family("mixtral"):
        torch.manual_seed(1)
        names = ["mlp.experts.gate_up_proj", "q_proj.weight"]
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_parameters=names, init_lora_weights=False, r=4)
        ).eval()
        outputs.append(logits(adapted))
    assert relative_error(outputs[1], outputs[0]) < 1e-5


def test_functional_call_with_other_weights() -> None:
    plain, patched = pair()
    new = {"head.weight": seeded((40, 16)), "blocks.0.up.weight": seeded((32, 16))}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got, want = (torch.func.functional_call(model, new, (IDS,)) for model in (patched, plain))
            assert relative_error(got, want) < 1e-5
    same(plain, patched)

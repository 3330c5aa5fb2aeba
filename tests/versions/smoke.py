"""What is run with every version: small models, patched and not, and how much of them ran fused.

``python -m tests.versions.smoke LIBRARY`` prints one line of JSON. Written with what all versions have; what one of
them lacks (a class, a config) is left out, and named.
"""

import copy
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from upcast.core.forward_override import kept

EXACT = 1e-5  # relative, of everything that is float32 on both sides
CACHED = 2e-3  # with keys and values in float16
IDS = torch.arange(3, 17).view(2, 7)
IDLE = ("CacheBuilder", "CacheSetter", "CacheClearer", "CacheReset", "FusedCache")  # they count nothing


class Result:
    """What was run, its largest difference, and what of it ran fused."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.absent: list[str] = []
        self.largest = 0.0
        self.fused: Counter[str] = Counter()

    def compare(self, what: str, got: torch.Tensor, want: torch.Tensor, limit: float = EXACT) -> None:
        """Note a difference; one beyond ``limit`` is a failure."""
        error = relative_error(got, want)
        assert error < limit, f"{what}: {error:.1e}, not less than {limit:.0e}"
        if limit == EXACT:
            self.largest = max(self.largest, error)

    def count(self, model: nn.Module) -> None:
        """Note which fused forwards have run in ``model``."""
        found = (forward for module in model.modules() for forward in kept(module))
        self.fused.update(type(each).__name__ for each in found if getattr(each, "calls", 0))

    def line(self, seconds: float) -> str:
        """Return the result as one line of JSON."""
        fields = {"ran": self.ran, "absent": self.absent, "fused": self.fused, "largest": self.largest}
        return json.dumps({**fields, "seconds": seconds})


# --- LitGPT -----------------------------------------------------------------------------------------------------------

# One of each kind: parallel residual, grouped and single queries, norms of heads, softcap, windows, experts.
LITGPT = (
    *("pythia-160m", "Llama-3-8B", "Gemma-2b", "Gemma-2-2b", "Mixtral-8x7B-v0.1", "phi-2", "falcon-7b"),
    *("Mistral-7B-v0.1", "OLMo-2-1124-7B", "Qwen3-0.6B", "Gemma-3-1b-it"),
)


def litgpt(result: Result) -> None:
    """Logits of a prompt and of single tokens after it, with and without a cache; LoRA; the story."""
    from litgpt.config import name_to_config

    for name in LITGPT:
        if name not in name_to_config:
            result.absent.append(name)
            continue
        _litgpt_model(name, result)
        result.ran.append(name)
    _litgpt_packed(result)
    _lora(result)
    story(result)


def _litgpt_model(name: str, result: Result) -> None:
    from litgpt import GPT

    from tests.litgpt_checkpoints import small_config

    torch.manual_seed(0)
    source = GPT(small_config(name, n_embd=64)).eval()
    plain = rounded(source)
    for cache, limit in (("float32", EXACT), ("float16", CACHED)):
        model = upcast.patch(GPT(source.config).eval(), kv_cache=cache)
        model.load_state_dict(source.state_dict())
        assert_patched(model)
        with torch.inference_mode():
            result.compare(name, model(IDS), plain(IDS))
            for got, want in zip(_steps(model), _steps(plain), strict=True):
                result.compare(f"{name}, {cache} cache", got, want, limit)
        result.count(model)


def _litgpt_packed(result: Result) -> None:
    from litgpt import GPT

    from tests.litgpt_checkpoints import small_config

    torch.manual_seed(0)
    source = GPT(small_config("Llama-3-8B", n_embd=64)).eval().bfloat16()
    plain, model = (
        copy.deepcopy(source).float(),
        upcast.patch(copy.deepcopy(source), storage="packed", kv_cache="float32"),
    )
    _packed("Llama-3-8B", model, result)
    with torch.inference_mode():
        for got, want in zip(_steps(model), _steps(plain), strict=True):
            result.compare("Llama-3-8B, packed", got, want)


def _packed(name: str, model: nn.Module, result: Result) -> None:
    """Matrices are in 12 bits where that is less, and the state dict gives them back in bfloat16."""
    packed = [each for each, parameter in model.named_parameters() if isinstance(parameter, upcast.PackedWeight)]
    state = model.state_dict()
    assert packed, name
    assert all(state[each].dtype == torch.bfloat16 for each in packed), name
    result.ran.append("packed")


def _steps(model: Any) -> Iterator[torch.Tensor]:
    """Yield the logits of a prompt and of tokens after it, as LitGPT's generation asks for them."""
    model.max_seq_length = 32
    model.set_kv_cache(batch_size=2)
    yield model(IDS, torch.arange(7))
    for at in range(7, 24):  # further than a window of 16
        yield model(IDS[:, :1] + at, torch.tensor([at]))
    model.clear_kv_cache()


def _lora(result: Result) -> None:
    from litgpt import lora

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 64, "padded_vocab_size": 128, "vocab_size": 128}
    groups = {"n_query_groups": 2, "intermediate_size": 64, "head_size": 8}
    learns = {"lora_r": 4, "lora_query": True, "lora_key": False, "lora_value": True, "lora_projection": True}
    model = lora.GPT(lora.Config.from_name("Llama-3-8B", **sizes, **groups, **learns)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    lora.mark_only_lora_as_trainable(model)
    learned = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    plain = rounded(model)
    plain.load_state_dict(learned, strict=False)
    upcast.patch(model)
    assert half_weights(model)
    for each in (plain, model):
        each(IDS).square().mean().backward()
    result.compare("LoRA", model(IDS), plain(IDS))
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        if want.grad is not None:
            result.compare("LoRA's gradients", got.grad, want.grad, 1e-4)
    result.count(model)
    result.ran.append("LoRA")


# The story's script, as it was told; run under UPCAST=1 beside its checkpoint folder.
STORY = """
from litgpt import LLM
llm = LLM.load("EleutherAI/pythia-160m")
text = llm.generate("What do Llamas eat?", top_k=1)
"""
SHOWN = """
import json, torch
from tests.versions.smoke import Result
from upcast import HalfWeight
stored = sum(isinstance(parameter, HalfWeight) for parameter in llm.model.parameters())
result = Result()
result.count(llm.model)
logits = llm.model(torch.arange(8)[None])
print(json.dumps({"text": text, "stored": stored, "logits": logits[0].tolist(), "fused": result.fused}))
"""


def story(result: Result) -> None:
    """The story's model has no numbers in plain float16; its script, unmodified under UPCAST=1, has float32's."""
    from tests.versions.story import checkpoint, plain_logits, run

    with tempfile.TemporaryDirectory() as folder:
        files = checkpoint(Path(folder))
        assert not plain_logits(files, torch.float16).isfinite().all()
        done = run(STORY + SHOWN, Path(folder), {"UPCAST": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        shown = json.loads(done.stdout.splitlines()[-1])
        assert shown["stored"], done.stderr
        result.compare("the story", torch.tensor(shown["logits"]), plain_logits(files, torch.float32))
        result.fused.update({f"story: {name}": count for name, count in shown["fused"].items()})
    result.ran.append("the story")


# --- Transformers -----------------------------------------------------------------------------------------------------

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Gemma3": {"head_dim": 8, "sliding_window": 5},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GPTNeoX": {},
}


def transformers(result: Result) -> None:
    """Logits, greedy generation over both caches, loading under UPCAST=1, and again what was saved."""
    for family, changes in TRANSFORMERS.items():
        model = _family(family, changes)
        plain = rounded(model)
        for cache, limit in (("float32", EXACT), ("float16", CACHED)):
            patched = upcast.patch(_family(family, changes), kv_cache=cache)
            assert_patched(patched)
            with torch.inference_mode():
                result.compare(family, patched(IDS).logits, plain(IDS).logits)
            result.compare(f"{family}, {cache} cache", _greedy(patched), _greedy(plain), limit)
            result.count(patched)
        result.ran.append(family)
    packed = upcast.patch(_family("Llama", {}).bfloat16(), storage="packed", kv_cache="float32")
    _packed("Llama", packed, result)
    result.compare("Llama, packed", _greedy(packed), _greedy(_family("Llama", {}).bfloat16().float()))
    _loaded(result)
    _saved(result)


def _family(family: str, changes: dict[str, Any]) -> Any:
    import transformers as library

    from tests.transformers_models import TEXT, make

    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    assert hasattr(library, name), name
    return make(f"{family}ForCausalLM", name, {**TEXT, **changes})


def _greedy(model: Any) -> torch.Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    kinds = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options, **kinds).logits)


def _loaded(result: Result) -> None:
    import os

    import transformers as library

    from upcast.integrations.transformers import load

    load.install()
    for kind in ("Llama", "Mixtral"):
        with tempfile.TemporaryDirectory() as folder:
            _family(kind, TRANSFORMERS[kind]).half().save_pretrained(folder)
            plain = library.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
            assert not half_weights(plain)
            os.environ["UPCAST"] = "1"
            model = library.AutoModelForCausalLM.from_pretrained(folder)
            del os.environ["UPCAST"]
            assert_patched(model)
            with torch.inference_mode():
                result.compare(f"{kind}, loaded", model(IDS).logits, rounded(plain)(IDS).logits)
    result.ran.append("from_pretrained")


def _saved(result: Result) -> None:
    """The config of what was saved names upcast, and a plain load patches again."""
    import transformers as library

    model = upcast.patch(_family("Llama", {}))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        again = library.AutoModelForCausalLM.from_pretrained(folder)
        assert_patched(again)
        result.compare("Llama, saved", again(IDS).logits, model(IDS).logits)
    result.ran.append("UpcastConfig")


# --- Diffusers, PEFT, torch -------------------------------------------------------------------------------------------


def diffusers(result: Result) -> None:
    """A U-Net and a transformer, patched; and a folder loaded under UPCAST=1."""
    import os

    import diffusers as library

    from upcast.integrations import diffusers as ours

    ours.install()
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16}
    torch.manual_seed(0)
    model = library.UNet2DConditionModel(sample_size=8, attention_head_dim=4, **blocks, **sizes).eval().half()
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    plain = rounded(model)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        want = plain(*inputs).sample
        model.save_pretrained(folder)
        os.environ["UPCAST"] = "1"
        loaded = library.UNet2DConditionModel.from_pretrained(folder)
        del os.environ["UPCAST"]
        assert half_weights(loaded)
        result.compare("UNet2DConditionModel, loaded", loaded(*inputs).sample, want)
        result.compare("UNet2DConditionModel", upcast.patch(model.float())(*inputs).sample, want)
    result.ran += ["UNet2DConditionModel", "from_pretrained"]


def peft(result: Result) -> None:
    """LoRA on a patched model: its output, its gradients, and merging."""
    import peft as library

    outputs, gradients = [], []
    for patched in (False, True):
        model = _family("Llama", {})
        model = upcast.patch(model) if patched else rounded(model)
        settings = library.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "gate_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        model = library.get_peft_model(model, settings)
        assert bool(half_weights(model)) is patched
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "lora_" in name])
        with torch.inference_mode():
            outputs.append([model(input_ids=IDS).logits, model.merge_and_unload()(input_ids=IDS).logits])
        result.count(model)
    result.compare("adapted", outputs[1][0], outputs[0][0])
    result.compare("merged", outputs[1][1], outputs[0][1], 1e-3)  # the sum is rounded
    for got, want in zip(gradients[1], gradients[0], strict=True):
        result.compare("gradients", got, want, 1e-4)
    result.ran += ["adapted", "gradients", "merged"]


def torch_alone(result: Result) -> None:
    """Modules of torch: forward, gradients, saving, copying, compiling, exporting."""
    import copy
    import io

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Embedding(128, 32), layer, nn.LayerNorm(32), nn.Linear(32, 128)).eval()
    plain = rounded(model)
    upcast.patch(model)
    assert half_weights(model)
    result.compare("forward", model(IDS), plain(IDS))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(tensor.dtype == torch.float16 for tensor in state.values() if tensor.dim() > 1)
    result.compare("copied", copy.deepcopy(model)(IDS), plain(IDS))
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        each(IDS).square().mean().backward()
    result.compare("gradients", model[2].weight.grad, plain[2].weight.grad, 1e-4)
    with torch.inference_mode():
        result.compare("compiled", torch.compile(model, backend="eager")(IDS), plain(IDS))
    with torch.no_grad():
        exported = torch.export.export(model.requires_grad_(False), (IDS,))
        result.compare("exported", exported.module()(IDS), plain(IDS))
    result.ran += ["forward", "saved", "copied", "gradients", "compiled", "exported"]
    transformers(result)
    litgpt(result)


CHECKS: dict[str, Callable[[Result], None]] = {
    "litgpt": litgpt,
    "transformers": transformers,
    "diffusers": diffusers,
    "peft": peft,
    "accelerate": diffusers,
    "torch": torch_alone,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # other versions warn of other things
    start, outcome = time.monotonic(), Result()
    CHECKS[sys.argv[1]](outcome)
    assert outcome.fused or sys.argv[1] in ("diffusers", "accelerate"), "nothing ran fused"
    print(outcome.line(time.monotonic() - start))

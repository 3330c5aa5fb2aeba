"""Small LitGPT models of every structure, fused and unfused, for the tests of the fused forwards."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.litgpt_checkpoints import small_config
from upcast.integrations.litgpt import install
from upcast.integrations.litgpt.gpt import FusedGPT
from upcast.integrations.litgpt.modules import Fused
from upcast.patching import transaction

pytest.importorskip("litgpt")

# Fields of a config that change the structure of a model rather than its size.
STRUCTURE = (
    *("norm_class_name", "norm_qk", "norm_qk_type", "post_attention_norm", "post_mlp_norm", "parallel_residual"),
    *("shared_attention_norm", "attn_bias", "rope_interleave", "bias", "mlp_class_name", "gelu_approximate"),
    *("scale_embeddings", "lm_head_bias", "norm_1", "norm_2"),
)
OPTIONAL = ("attention_scores_scalar", "attention_logit_softcapping", "final_logit_softcapping", "latent_attention")
LIMITS = {"float32": 1e-5, "float16": 1e-3}
LENGTH, PROMPT = 19, 14  # the sliding windows of small_config hold 16 positions: decoding wraps them


def _structure(name: str) -> tuple[Any, ...]:
    from litgpt import Config

    config = Config.from_name(name)
    heads = (config.n_query_groups == 1, config.n_query_groups == config.n_head, config.head_size * config.n_head)
    windows = (bool(config.sliding_window_size), str(config.sliding_window_indices)[:8], str(config.rope_indices)[:8])
    rope = (config.rope_n_elem == config.head_size, config.rope_n_elem % 2, str(sorted(config.rope_adjustments or ())))
    family = ("Gemma" in name, "OLMo" in name, heads[2] == config.n_embd)
    fields = tuple(getattr(config, field) for field in STRUCTURE)
    return (*fields, *(bool(getattr(config, field)) for field in OPTIONAL), *heads[:2], *windows, *rope, *family)


def _names() -> list[str]:
    from litgpt.config import name_to_config

    return list({_structure(name): name for name in reversed(name_to_config)}.values())


NAMES = _names()


def fused_of(model: nn.Module) -> dict[str, Fused]:
    found = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {name: forward for name, forward in found.items() if isinstance(forward, Fused)}


def calls(model: nn.Module) -> int:
    return sum(forward.calls for forward in fused_of(model).values())


def without_fusion(model: Any) -> Any:
    """A copy of a patched model that runs LitGPT's own forwards."""
    plain = copy.deepcopy(model)
    transaction.remove_extension(plain, install.LitGPTModels())
    assert not fused_of(plain)
    return plain


def make(name: str, **changes: Any) -> Any:
    """LitGPT's config ``name``, small, with seeded weights; vectors are not left at ones and zeros."""
    from litgpt import GPT

    torch.manual_seed(0)
    model = GPT(small_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in model.modules():  # LitGPT leaves this one as it was in memory, which may be NaN
            if type(module).__name__ == "GroupedTopkRouter":
                module.weight.normal_(std=0.3)
    return model


def modules_only(model: Any) -> Any:
    """A copy of a patched model without the call per block: norms, attention and MLPs are fused one by one."""
    modular = copy.deepcopy(model)
    del modular.__dict__["forward"]
    assert not any(isinstance(forward, FusedGPT) for forward in fused_of(modular).values())
    return modular


def pair(name: str, kv_cache: str, **changes: Any) -> tuple[Any, Any]:
    model = upcast.patch(make(name, **changes), kv_cache=kv_cache)
    return model, without_fusion(model)


IDS = torch.randint(0, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def steps(model: Any, batch: int, maxp1: bool, **options: Any) -> Iterator[Tensor]:
    """Logits of a prefill and of every decoded position after it."""
    model.set_kv_cache(batch, LENGTH + 3)
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, LENGTH))]:
        extra = {"input_pos_maxp1": end} if maxp1 else {}
        yield model(IDS[:batch, start:end], torch.arange(start, end), **extra, **options)

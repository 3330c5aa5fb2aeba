"""Transformations of real architectures, beside the unpatched model."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import upcast
from tests.conftest import half_weights, relative_error, rounded
from tests.tensor.test_graphs import TRACERS
from tests.tensor.test_transforms import FIRST, SECOND_OR_FORWARD, TOLERANCE, WARNINGS, Function

pytestmark = WARNINGS


class FromEmbeddings(nn.Module):
    """A language model from its embedded tokens on, so that there is something to differentiate."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if hasattr(self.model, "get_input_embeddings"):
            return self.model(inputs_embeds=x, use_cache=False).logits
        return self._litgpt(x)

    def _litgpt(self, x: Tensor) -> Any:
        gpt, time = self.model, x.shape[1]
        for block in gpt.transformer.h:
            x = block(x, gpt.cos[:time].unsqueeze(0), gpt.sin[:time].unsqueeze(0), None, None)
        return gpt.lm_head(gpt.transformer.ln_f(x))


def litgpt() -> Any:
    library = pytest.importorskip("litgpt")
    from tests.litgpt_checkpoints import small_config

    return library.GPT(small_config("SmolLM2-135M-Instruct")).eval()


def transformers(kind: str) -> Any:
    from tests.transformers_models import FAMILIES, make

    return make(*next(row for row in FAMILIES if row[0] == kind)[:3])


REAL: dict[str, Function] = {
    "GPT": litgpt,
    "Llama": lambda: transformers("LlamaForCausalLM"),
    "GPT-2": lambda: transformers("GPT2LMHeadModel"),
}
OF_REAL = ["vmap", "vmap of grad", "jacobian, vectorized", "is_grads_batched", "checkpoint", "create_graph", "jvp"]
OF_REAL += ["jit.trace of a module", "jit.trace of a function", "make_fx", "make_fx of vmap", "functionalize"]


NO_REAL = {(kind, name) for kind in ("Llama", "GPT-2") for name in ("make_fx", "make_fx of vmap")}  # masks ask numbers


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] if name.startswith("jit") and kind != "GPT" else [])
        for kind in REAL
        for name in OF_REAL
        if (kind, name) not in NO_REAL
    ],
)
def test_real_architectures(kind: str, name: str) -> None:
    plain = FromEmbeddings(rounded(REAL[kind]()))
    model = upcast.patch(copy.deepcopy(plain))
    x = torch.randn(1, 4, 32)
    run = {**SECOND_OR_FORWARD, **FIRST, **TRACERS}[name]
    with sdpa_kernel(SDPBackend.MATH) if name in SECOND_OR_FORWARD else contextlib.nullcontext():
        assert relative_error(run(model, x), run(plain, x)) < 5 * TOLERANCE
    assert half_weights(model)

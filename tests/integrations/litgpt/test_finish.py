"""The last norm and the head run in the blocks' call, unless someone watches or changed them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import half_weights, relative_error
from tests.litgpt_checkpoints import small_config
from upcast.kernels import native

pytest.importorskip("litgpt")
pytestmark = pytest.mark.skipif(not native.can_call_blocks(), reason="torch has no exchange interface")

MODELS = {
    "SmolLM2-135M-Instruct": "an RMSNorm, and a head that is the embedding",
    "pythia-14m": "a LayerNorm",
    "Gemma-2-2b": "an offset, and a softcap on the logits",
    "phi-2": "a bias",
}
STORAGES = ["float16", "packed"]
PROMPT = torch.arange(7)[None] * 5 + 2
TOKENS = [11, 3, 200]


def model_of(name: str) -> Any:
    from litgpt import GPT

    torch.manual_seed(0)
    model: Any = GPT(small_config(name, n_embd=64, intermediate_size=128)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # which both storages hold, but for what is tiny
    if "SmolLM2" in name:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def decode(model: Any) -> Tensor:
    """Return the logits of a prompt and of tokens after it."""
    model.set_kv_cache(1, 16)
    with torch.inference_mode():
        logits = [model(PROMPT, torch.arange(7), input_pos_maxp1=7)]
        for at, token in enumerate(TOKENS, start=7):
            logits.append(model(torch.tensor([[token]]), torch.tensor([at]), input_pos_maxp1=at + 1))
    return torch.cat(logits, dim=1)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of all blocks gave logits."""
    calls: list[bool] = []
    blocks = native.blocks

    def count(*args: Any) -> Any:
        calls.append(args[4] is not None)
        return blocks(*args)

    monkeypatch.setattr(native, "blocks", count)
    return calls


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_modules(name: str, storage: str, ended: list[bool]) -> None:
    model = model_of(name)
    want = decode(model)
    upcast.patch(model, storage=storage, kv_cache="float32")
    kind = upcast.PackedWeight if storage == "packed" else upcast.HalfWeight
    assert {type(weight) for weight in half_weights(model).values()} == {kind}
    got = decode(model)
    assert len(ended) >= len(TOKENS)
    assert all(ended)
    assert relative_error(got, want) < (1e-5 if storage == "packed" else 2e-3)
    ended.clear()
    model.lm_head.register_forward_hook(lambda *_: None)
    assert relative_error(got, decode(model)) < 1e-6
    assert len(ended) >= len(TOKENS)
    assert not any(ended)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _double(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def _halve(module: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(0.5)


def _bias(model: Any) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features), requires_grad=False)


def _other_head(model: Any) -> None:
    head = Doubled(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    head.weight = nn.Parameter(model.lm_head.weight.detach().float() * 1.5, requires_grad=False)
    model.lm_head = head


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {  # and whether the call still gives the logits
    "a hook on the head": (lambda m: m.lm_head.register_forward_hook(lambda _, args, out: out * 3), False),
    "a hook on the norm": (lambda m: m.transformer.ln_f.register_forward_hook(lambda _, args, out: out + 1), False),
    "another forward of the head": (lambda m: _double(m.lm_head), False),
    "another forward of the norm": (lambda m: _double(m.transformer.ln_f), False),
    "another head": (_other_head, False),
    "another class of the head": (lambda m: setattr(m.lm_head, "__class__", Doubled), False),
    "no norm": (lambda m: setattr(m.transformer, "ln_f", nn.Identity()), True),
    "another epsilon": (lambda m: setattr(m.transformer.ln_f, "eps", 0.5), True),
    "a bias": (_bias, True),
    "weights written to": (lambda m: _halve(m.lm_head), True),
    "a norm written to": (lambda m: _halve(m.transformer.ln_f), True),
    "a softcap": (lambda m: setattr(m.config, "final_logit_softcapping", 0.5), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count(change: str, ended: list[bool]) -> None:
    edit, stays = CHANGES[change]
    plain, model = model_of("pythia-14m"), model_of("pythia-14m")
    upcast.patch(model, storage="packed", kv_cache="float32")
    assert relative_error(decode(model), decode(plain)) < 1e-5
    assert all(ended)
    edit(plain), edit(model)
    ended.clear()
    got, want = decode(model), decode(plain)
    assert relative_error(got, want) < 1e-3  # a weight that was written to is float16 then
    assert ended == ([True] * 4 if stays else [False] * len(ended))

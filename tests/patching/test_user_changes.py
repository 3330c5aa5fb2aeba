"""What a program changes in one patched model runs, in prefill and in decode."""

import importlib
import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error, rounded
from tests.fused_models import make
from tests.patching.test_user_code import IDS, Pair, _changed, _mine, lm, modeling_utils

pytest.importorskip("transformers")
sdpa_attention = importlib.import_module("transformers.integrations.sdpa_attention")

pytestmark = pytest.mark.usefixtures("inference_on_one_thread")


def _blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def _class(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = _blocks(model)[1].get_submodule(path)
        kind = type(module)
        module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": _mine(kind.forward)})

    return change


def _class_of_another_weight(model: Any) -> None:
    linear = _blocks(model)[1].get_submodule("mlp")
    linear = linear.proj if hasattr(linear, "proj") else linear.down_proj
    kind = type("Mine", (nn.Linear,), {"weight": property(lambda self: self._parameters["weight"] * 2)})
    linear.__class__ = kind


def _instance(path: str, name: str = "forward") -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = _blocks(model)[1].get_submodule(path)
        own = getattr(type(module), name)
        setattr(module, name, types.MethodType(_mine(own), module))

    return change


def _around(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = _blocks(model)[1].get_submodule(path)
        module.forward = _mine(module.forward)

    return change


def _hook(path: str, before: bool = False) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = _blocks(model)[1].get_submodule(path)
        if before:
            module.register_forward_pre_hook(lambda _, args: (_changed(args[0]), *args[1:]))
        else:
            module.register_forward_hook(lambda _, args, output: _changed(output))

    return change


def _attribute(path: str, **values: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name, value in values.items():
            setattr(_blocks(model)[1].get_submodule(path), name, value)

    return change


def _embedding_hook(model: Any) -> None:
    embedding = model.transformer.wte if hasattr(model, "transformer") else model.model.embed_tokens
    embedding.register_forward_hook(lambda _, args, output: _changed(output))


def _other_implementation(model: Any) -> None:
    modeling_utils.AttentionInterface.register("mine", _mine(sdpa_attention.sdpa_attention_forward))
    model.config._attn_implementation = "mine"


def _function_as_activation(model: Any) -> None:
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = torch.tanh


def _around_a_module(path: str) -> Callable[[Any], None]:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _changed(self.inner(*args, **kwargs))

    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        owner = _blocks(model)[1].get_submodule(parent)
        setattr(owner, name, Wrapper(getattr(owner, name)))

    return change


class NoPositions(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 1, 8), torch.zeros(1, 1, 8)


def _no_positions(model: Any) -> None:
    model.model.rotary_emb = NoPositions()


class MyActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 3


CHANGED: list[tuple[str, str, Callable[[Any], None]]] = [
    *(("SmolLM2", f"class of {path or 'block'}", _class(path)) for path in ("", "attn", "mlp", "norm_2", "mlp.fc_1")),
    ("SmolLM2", "class with another weight", _class_of_another_weight),
    *(
        ("SmolLM2", f"forward of {path or 'block'}", _instance(path))
        for path in ("", "attn", "mlp", "norm_2", "attn.qkv")
    ),
    ("SmolLM2", "scores", _instance("attn", "scaled_dot_product_attention")),
    *(("SmolLM2", f"around {path}", _around(path)) for path in ("attn", "mlp", "norm_2", "mlp.proj")),
    *(("SmolLM2", f"hook on {path}", _hook(path)) for path in ("attn", "mlp", "norm_2", "mlp.fc_2")),
    ("SmolLM2", "pre-hook on mlp", _hook("mlp", before=True)),
    ("SmolLM2", "mscale", _attribute("attn", mscale=0.2)),
    ("SmolLM2", "unit offset", _attribute("norm_2", add_unit_offset=True)),
    ("SmolLM2", "embedding", _embedding_hook),
    ("Pythia", "class of mlp", _class("mlp")),
    ("Pythia", "class of norm", _class("norm_1")),
    ("Pythia", "forward of mlp", _instance("mlp")),
    *(
        ("Llama", f"class of {p or 'layer'}", _class(p))
        for p in ("", "self_attn", "mlp", "input_layernorm", "mlp.act_fn")
    ),
    ("Llama", "class with another weight", _class_of_another_weight),
    *(
        ("Llama", f"forward of {p or 'layer'}", _instance(p))
        for p in ("", "self_attn", "mlp", "mlp.act_fn", "mlp.up_proj")
    ),
    *(("Llama", f"around {path}", _around(path)) for path in ("self_attn", "mlp", "input_layernorm", "mlp.down_proj")),
    *(("Llama", f"hook on {path}", _hook(path)) for path in ("self_attn", "mlp", "mlp.act_fn", "self_attn.q_proj")),
    ("Llama", "pre-hook on activation", _hook("mlp.act_fn", before=True)),
    ("Llama", "activation", _attribute("mlp", act_fn=MyActivation())),
    ("Llama", "torch's activation", _attribute("mlp", act_fn=nn.ReLU())),
    (
        "Llama",
        "function as activation",
        lambda m: [
            setattr(layer.mlp, "_act", 0)
            or (layer.mlp._modules.pop("act_fn") and layer.mlp.__dict__.__setitem__("act_fn", torch.tanh))
            for layer in m.model.layers
        ],
    ),
    ("Llama", "scaling", _attribute("self_attn", scaling=5.0)),
    ("Llama", "implementation", _other_implementation),
    ("Llama", "embedding", _embedding_hook),
    ("Llama", "rotary embedding", _no_positions),
    *(("Llama", f"wrapper of {path}", _around_a_module(path)) for path in ("self_attn", "mlp", "self_attn.q_proj")),
    *(("SmolLM2", f"wrapper of {path}", _around_a_module(path)) for path in ("mlp", "norm_2", "attn.qkv")),
    ("Qwen3", "class of the query's norm", _class("self_attn.q_norm")),
    ("Qwen3", "hook on the key's norm", _hook("self_attn.k_norm")),
    ("GPT-2", "class of mlp", _class("mlp")),
    ("GPT-2", "forward of activation", _instance("mlp.act")),
    ("GPT-2", "hook on attention", _hook("attn")),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "what", "change"), [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in CHANGED])
def test_what_is_changed_in_one_model_runs(family: str, what: str, change: Callable[[Any], None], when: str) -> None:
    pair = Pair(family, unpatched=when == "before")
    if when == "after":
        assert pair.fast() or family == "GPT-2"
    pair.both(change)
    if when == "before":
        pair.patch()
    pair.same_but_unusual()


def test_the_cache_of_litgpt_may_be_changed_in_one_model() -> None:
    """Such changes last as long as the cache."""
    pair = Pair("SmolLM2")
    for change in (
        lambda cache: setattr(cache, "forward", _mine(cache.forward)),
        lambda cache: setattr(cache, "__class__", type("Mine", (lm.KVCache,), {"forward": _mine(lm.KVCache.forward)})),
        lambda cache: cache.register_forward_hook(lambda _, args, output: _changed(output)),
    ):
        found = []
        for model in (pair.model, pair.plain):
            model.set_kv_cache(1, 16)
            change(model.transformer.h[1].attn.kv_cache)
            found.append([model(IDS[:, :5], torch.arange(5)), model(IDS[:, 5:6], torch.arange(5, 6))])
        assert pair.error(*found) < 1e-5
        assert relative_error(found[0][1], pair.usual[0][:, 5:6]) > 1e-3


@pytest.mark.parametrize("error", [TypeError("of the user"), upcast.UpcastError("of the user")], ids=repr)
def test_an_error_in_user_code_is_its_own_and_comes_once(error: Exception) -> None:
    """What kernels do not take runs in LitGPT's own forward; what the user's code raises runs nothing again."""
    model, seen = upcast.patch(make("pythia-160m")), []

    def hook(*_: object) -> None:
        seen.append(1)
        raise error

    model.transformer.wte.register_forward_hook(hook)
    with pytest.raises(type(error), match="of the user"):
        model(IDS)
    assert len(seen) == 1


def test_what_kernels_do_not_take_is_torch_s_to_answer() -> None:
    model = make("pythia-160m")
    plain = rounded(model)
    for each in (upcast.patch(model), plain):
        norm = each.transformer.h[0].norm_1
        norm.weight.data = norm.weight.data.double()
    with pytest.raises(RuntimeError) as want:
        plain(IDS)
    with pytest.raises(RuntimeError, match=re.escape(str(want.value))):
        model(IDS)

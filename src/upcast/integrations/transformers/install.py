"""Fused forwards for Transformers: norms, gated MLPs, attention and layers of the Llama kind, and float16 KV caches.

Many families carry copies of the modules of Llama, Mistral, Qwen2 or Qwen3 under their own names. What counts as such a
copy is decided by the code of its forward, compared with theirs in the installed version, so that a family whose module
does anything else keeps its own. tests/integrations/transformers/test_cache.py checks their forwards against float32.
"""

import dis
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from upcast.core.errors import describe
from upcast.core.extensions import Extension, register
from upcast.core.forward_override import push
from upcast.core.module_tree import modules
from upcast.integrations import stepping_aside
from upcast.integrations.fused import fuses as is_fused
from upcast.integrations.transformers import saving
from upcast.integrations.transformers.decoder_layer import FusedDecoderLayer
from upcast.integrations.transformers.experts import FusedExperts
from upcast.integrations.transformers.kv_cache import LayerKey, downcast
from upcast.integrations.transformers.layer_stack import FusedModel
from upcast.integrations.transformers.modules import FusedAttention, FusedGatedMLP, FusedRMSNorm, activation
from upcast.integrations.transformers.versions import CACHE_NAMES, cache_name, why_in_part, why_unfused
from upcast.kernels import transforms
from upcast.tensor import autocast

_APPENDED = frozenset({"keys", "values", "_buffers"})  # the last are of our float16 layers


class TransformersModels(Extension):
    """The models of Transformers."""

    name = "transformers"

    def install(self, root: nn.Module, kv_cache: str) -> None:
        """Give the models in ``root`` their fused forwards and, if asked for, float16 caches."""
        library = sys.modules.get("transformers.modeling_utils")
        if library is None:  # then no module of ``root`` can be of Transformers
            return
        saving.install(library)
        fuses = not why_unfused()
        hook = _Downcast()
        for model in [module for module in modules(root) if isinstance(module, library.PreTrainedModel)]:
            for module in modules(model):
                if fuses and "forward" not in module.__dict__:
                    _fuse(module)
            for layer in modules(model):  # once what is inside is known
                if fuses and "forward" not in layer.__dict__ and _is_layer(layer):
                    push(layer, FusedDecoderLayer(layer))
            if fuses and "forward" not in model.__dict__ and _is_stack(model):
                push(model, FusedModel(model))
            if kv_cache == "float16" and not any(map(_is_ours, model._forward_pre_hooks.values())):
                model.register_forward_pre_hook(hook, with_kwargs=True)

    def install_caches(self, root: nn.Module, kv_cache: str) -> None:
        """Caches stay the library's own; what is saved says how it was patched, under every policy."""
        if library := sys.modules.get("transformers.modeling_utils"):
            saving.install(library)

    def remarks(self, root: nn.Module) -> list[str]:
        """Return why no module of a model of Transformers in ``root`` is fused, if none can be."""
        library = sys.modules.get("transformers.modeling_utils")
        if library is None or not any(isinstance(module, library.PreTrainedModel) for module in modules(root)):
            return []
        why = why_unfused() or why_in_part()
        return [f"not fused: {why}"] if why else []

    def remove(self, root: nn.Module) -> None:
        """Take away the hooks that give caches."""
        for module in modules(root):
            _leave_caches_alone(module)

    def doors(self, root: nn.Module) -> Iterator[nn.Module]:
        """``generate`` calls the encoder of a model that has one by itself."""
        for module in modules(root):
            if hasattr(type(module), "generate") and getattr(
                getattr(module, "config", None), "is_encoder_decoder", False
            ):
                yield module.get_encoder()  # type: ignore[operator]

    def appended(self, state: object) -> frozenset[str]:
        """A layer's keys and values grow by replacing them; a window of fixed size moves its rows along in place."""
        library = sys.modules.get("transformers.cache_utils")
        layer = getattr(library, "CacheLayerMixin", ())
        moves = type(state).__name__ == "StaticSlidingWindowLayer"
        return _APPENDED if isinstance(state, layer) and not moves else frozenset()


def _leave_caches_alone(module: nn.Module) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if _is_ours(hook)]:
        del module._forward_pre_hooks[key]
    for key in module._forward_pre_hooks_with_kwargs.keys() - module._forward_pre_hooks.keys():
        del module._forward_pre_hooks_with_kwargs[key]


class _Downcast:
    """What the models within one patched root call before they run; ``wide`` is what `downcast` leaves in float32."""

    def __init__(self) -> None:
        self.wide: set[LayerKey] = set()

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is None or transforms.active() or torch.is_grad_enabled() or autocast.enabled():
            return
        try:
            downcast(cache, self.wide, compiled=_is_compiled(model))
        except Exception as error:  # each layer is Transformers' own or ours, and works as it is
            _leave_caches_alone(model)
            stepping_aside.say_once(f"the KV cache stays in float32: {describe(error)}")


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, _Downcast)


def _is_compiled(model: nn.Module) -> bool:
    """Whether calls of the model go through torch.compile: by Transformers' ``generate``, or by the program's code."""
    return "_compiled_call" in vars(model) or hasattr(model.forward, "_torchdynamo_orig_callable")


def _fuse(module: Any) -> None:
    if not type(module).__module__.startswith("transformers.models."):
        return
    kinds = _patterns()
    code = _code(type(module).forward)
    if code is None:
        return
    if code == kinds["norm"] and _vector(module, "weight") and hasattr(module, "variance_epsilon"):
        push(module, FusedRMSNorm(module))
    elif code == kinds["mlp"] and (name := activation(module)):
        push(module, FusedGatedMLP(module, name))
    elif code in kinds["attention"] and _rope(module) == kinds["rope"]:
        push(module, FusedAttention(module))
    elif code == kinds["experts"] and _gates(module) and activation(module):
        push(module, FusedExperts(module))


def _gates(experts: Any) -> bool:
    """Whether experts are as Mixtral's: a gate, no biases, matrices as `nn.Linear` has them."""
    settings = (("has_gate", True), ("has_bias", False), ("is_transposed", False))
    return all(getattr(experts, name, usual) is usual for name, usual in settings)


def _is_layer(module: Any) -> bool:
    """Whether ``module`` is a decoder layer of the Llama kind whose attention and norms are fused."""
    parts: dict[str, type] = {"self_attn": FusedAttention}
    parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), FusedRMSNorm)
    inside = module._modules
    if not all(name in inside and isinstance(inside[name].__dict__.get("forward"), parts[name]) for name in parts):
        return False
    code = _code(type(module).forward)
    return "mlp" in inside and code is not None and code in _patterns()["layer"]


def _is_stack(model: Any) -> bool:
    """Whether the forward of ``model`` runs layers of the Llama kind one after the other, and nothing between two."""
    layers = model._modules.get("layers")
    if not isinstance(layers, nn.ModuleList) or not any(is_fused(layer, FusedDecoderLayer) for layer in layers):
        return False
    code = _code(type(model).forward)
    return code is not None and code in _patterns()["model"]


@functools.cache
def _patterns() -> dict[str, Any]:
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen2 import modeling_qwen2 as qwen2
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    attentions = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention, qwen3.Qwen3Attention)
    models = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model, qwen3.Qwen3Model)
    layers = [llama.LlamaDecoderLayer]
    if _same_steps(mixtral.MixtralDecoderLayer.forward, llama.LlamaDecoderLayer.forward):  # in another order
        layers.append(mixtral.MixtralDecoderLayer)
    ours = bool(cache_name())
    return {
        "norm": _code(llama.LlamaRMSNorm.forward),
        "mlp": _code(llama.LlamaMLP.forward),
        "attention": [_code(kind.forward) for kind in attentions if ours],
        "model": [_code(kind.forward) for kind in models if ours],
        "experts": _experts(mixtral),
        "layer": [_code(kind.forward) for kind in layers if ours],
        "rope": (_code(llama.apply_rotary_pos_emb), _code(llama.rotate_half)),
    }


def _same_steps(one: Any, other: Any) -> bool:
    """Whether two functions take the same steps, whatever they hand on: by names and kinds of instructions."""
    if _code(one) is None or _code(other) is None:
        return False
    codes: list[CodeType] = [_unwrapped(function).__code__ for function in (one, other)]
    steps, others = (
        Counter(each.opname for each in dis.get_instructions(code) if not each.opname.startswith("LOAD_FAST"))
        for code in codes
    )
    return {*codes[0].co_names} == {*codes[1].co_names} and steps == others


def _experts(mixtral: Any) -> Any:
    """Return what Mixtral's experts do, where they lie in one parameter and a config names how: from 5 on."""
    forward = getattr(getattr(mixtral, "MixtralExperts", None), "forward", None)
    return _code(forward) if hasattr(forward, "__wrapped__") else None


def _rope(module: Any) -> Any:
    home = sys.modules[type(module).__module__]
    parts = (getattr(home, "apply_rotary_pos_emb", None), getattr(home, "rotate_half", None))
    return tuple(map(_code, parts))


def _unwrapped(function: Any) -> Any:
    while type(function) is FunctionType and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _code(function: Any) -> Any:
    """Return what a function does, without its name and its docstring; None for what is no function."""
    function = _unwrapped(function)
    if type(function) is not FunctionType:
        return None
    code: CodeType = function.__code__
    constants = tuple(value for value in code.co_consts if value != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, constants


def _vector(module: nn.Module, name: str) -> bool:
    weight = module._parameters.get(name)
    return weight is not None and weight.dim() == 1 and weight.dtype == torch.float32


register(TransformersModels())

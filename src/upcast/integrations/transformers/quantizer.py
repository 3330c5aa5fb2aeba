"""Transformers' own door: ``from_pretrained(..., quantization_config=upcast.UpcastConfig())``, by its registry.

A folder that a patched model was saved to has such a config in its config.json, so that a plain ``from_pretrained``
patches again what it loads: `_upcast_startup` tells Transformers of us when it is imported. From Transformers 5 on the
weights arrive in float16 (`transformers.load`); older versions load float32, which is patched then. Once loaded, the
model is patched like every other, and nothing of the quantizer stays with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import _upcast_startup
from upcast.core.about import VERSION
from upcast.core.errors import UpcastError
from upcast.core.module_tree import modules
from upcast.integrations import loading, stepping_aside
from upcast.integrations.loading import Loading
from upcast.integrations.stepping_aside import NotOurs
from upcast.integrations.transformers import load
from upcast.integrations.transformers.saving import METHOD, saved
from upcast.policy import policy as policies

BACK = "python -m upcast convert FOLDER --storage bfloat16"


class UpcastConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Patch what ``from_pretrained`` of Transformers loads: ``quantization_config=upcast.UpcastConfig()``.

    Weights (parameters of two dimensions and more) are stored in float16, and the model computes in float32, as
    `upcast.patch` has it. ``save_pretrained`` writes float16 weights and this config with them: the folder gives a
    patched model again where upcast is installed, and an ordinary float16 one where it is not. Given for such a folder,
    this config takes the place of the folder's.

    Args:
        policy: which op classes run in float32, as for `upcast.patch`; kept as a policy string.
        kv_cache: ``"float16"``, ``"float32"``, or None for the policy's.
        keep: patterns of parameter or module names to hold in float32.
        trainable: patterns of what learns and is held in float32.
        storage: how weights are stored, as for `upcast.patch`; kept in the policy string.
        weights: ``"packed"`` in the folders that `python -m upcast convert --storage packed` writes: their files hold
            packed weights, and nothing but upcast reads them.

    Raises:
        UpcastError: an unknown policy, kv_cache or storage, patterns that are no list of texts, or a field of a
            later upcast.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> config = upcast.UpcastConfig(keep=["lm_head"])
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", quantization_config=config)
        >>> type(model.model.embed_tokens.weight).__name__, type(model.lm_head.weight).__name__
        ('HalfWeight', 'Parameter')
    """

    def __init__(
        self,
        policy: policies.Choice = "safe",
        kv_cache: str | None = None,
        keep: Sequence[str] = (),
        trainable: Sequence[str] = (),
        storage: str | None = None,
        weights: str | None = None,
        **fields: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        made_by = fields.pop("upcast_version", VERSION)
        if fields.pop("quant_method", METHOD) != METHOD or fields:
            raise UpcastError(
                f"UpcastConfig with {', '.join(map(repr, fields)) or 'another quant_method'}; it has policy, kv_cache, "
                f"keep, trainable, storage and weights. It was made for upcast {made_by}, and this is {VERSION}. "
                "Correct it, or load the checkpoint unpatched with UPCAST=0."
            )
        if weights not in (None, "packed"):
            raise UpcastError(
                f"UpcastConfig with weights={weights!r}; it can be 'packed'. Update upcast, or convert again."
            )
        if kv_cache is not None:
            policies.check_kv_cache(kv_cache)
        self.weights = weights
        self.policy = str(policies.resolve(policies.stored(policy, storage)))
        self.kv_cache = kv_cache
        self.keep, self.trainable = _texts("keep", keep), _texts("trainable", trainable)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the config that a checkpoint's config.json holds; its policy is text, and no path of a file."""
        policy = config_dict.get("policy", "safe")
        if not isinstance(policy, str):
            raise UpcastError(
                f"quantization_config with policy={policy!r}; it is a policy string. Correct config.json."
            )
        return super().from_dict({**config_dict, "policy": policies.Policy.parse(policy)}, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them; config.json keeps them under ``quantization_config``."""
        more = {"trainable": self.trainable, "weights": self.weights}
        given = {name: value for name, value in more.items() if value}
        return saved(self.policy, self.kv_cache, self.keep) | given


def _texts(name: str, given: Any) -> list[str]:
    if isinstance(given, str) or not all(isinstance(each, str) for each in given):
        raise UpcastError(f"{name}={given!r}; it must be a list of patterns. Use {name}=[...].")
    return list(given)


class UpcastQuantizer(HfQuantizer):  # type: ignore[misc]
    """What Transformers calls while it loads a model with an `UpcastConfig`."""

    quantization_config: UpcastConfig

    def __init__(self, quantization_config: UpcastConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        given = quantization_config
        # None: the model stays as it is
        self.loading: Loading | None = Loading(given.kv_cache, given.policy, given.keep, given.trainable, strict=True)
        load.install()
        if given.weights and not load.reads_packed_files():
            raise UpcastError(
                "weights that are packed in their files, with a Transformers that does not take them; they need "
                f"Transformers 5 or newer. Update it, or convert the checkpoint back: {BACK}."
            )

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what asks for something else than a model on the CPU; a folder that only names us gives way."""
        if kwargs.get("device_map") is not None:
            try:
                loading.check_arguments({"device_map": kwargs["device_map"]})
            except NotOurs as reason:
                self._give_way(str(reason))

    def _give_way(self, why: str) -> None:
        if self.quantization_config.weights:
            raise UpcastError(
                f"weights that are packed in their files, and cannot be used so: {why}; packed weights are for models "
                f"that upcast patches, on the CPU. Convert the checkpoint back: {BACK}."
            )
        if not self.pre_quantized:
            raise UpcastError(f"an UpcastConfig with {why}; upcast stores float16 on the CPU. Leave one of them out.")
        self.loading = None
        stepping_aside.say_once(f"a checkpoint that was saved patched is loaded as it is, unpatched: {why}")

    def update_dtype(self, dtype: Any) -> Any:
        """Have the model built for float32."""
        if self.loading is not None and dtype not in (None, *loading.DTYPES):
            self._give_way(f"dtype={dtype}")
        return dtype if self.loading is None else torch.float32

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """As `update_dtype`; Transformers before 4.57 calls it so."""
        return self.update_dtype(torch_dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Have the empty model be float32, whatever came of `update_dtype`, and refuse what patching would refuse."""
        if self.loading is None:
            return
        _to_float32(model)
        if loading.current() is None:
            self._try(self.loading.check, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Patch the loaded model, unless a loader of ours is around; nothing of the quantizer stays."""
        for module in modules(model):
            config = getattr(module, "config", None)
            for fields in (vars(module), getattr(config, "__dict__", {})):
                for name in _MARKS:
                    fields.pop(name, None)
        if self.loading is not None and loading.current() is None:
            self._try(self.loading.adopt, model)
        return model

    def _try(self, step: Callable[[Any], None], model: Any) -> None:
        """Take a step towards a patched model; one that was saved patched and cannot be so any more is float32."""
        try:
            step(model)
        except UpcastError as error:
            if not self.pre_quantized:
                raise
            self._give_way(str(error))
            _to_float32(model)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A patched model saves like any other."""
        return True

    @property
    def is_trainable(self) -> bool:
        """What learns is float32."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The base may learn as well."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes a patched model."""
        return True


# What Transformers notes on a model that it loads with a quantizer, and on its configs.
_MARKS = (
    *("hf_quantizer", "is_quantized", "quantization_method"),
    *("quantization_config", "_is_quantized", "_pre_quantization_dtype"),
)


def _to_float32(model: Any) -> None:
    nn.Module.float(model)  # Transformers' own refuses a model that is being quantized
    config = model.config
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if part is not None:
            setattr(part, _DTYPE, torch.float32)


_DTYPE = "dtype" if hasattr(PretrainedConfig, "dtype") or "dtype" in vars(PretrainedConfig()) else "torch_dtype"


def register() -> None:
    """Tell Transformers of the config and its quantizer, in place of what `_upcast_startup` has told it."""
    for table, register_as, kind in (
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, UpcastConfig),
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, UpcastQuantizer),
    ):
        if table.get(METHOD) is not kind:
            table.pop(METHOD, None)
            register_as(METHOD)(kind)
    _upcast_startup.let_arguments_win(auto.AutoHfQuantizer)


register()

"""Transformers' own door: UpcastConfig as quantization_config, saved in config.json, and read there by a plain load."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched, half_weights, relative_error, rounded
from tests.transformers_models import FAMILIES, IDS, TEXT, first_output, make

transformers = pytest.importorskip("transformers")
from transformers.quantizers import auto  # noqa: E402

AUTO = transformers.AutoModelForCausalLM
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KINDS = [row for row in FAMILIES if row[0] in ("LlamaForCausalLM", "MixtralForCausalLM", "T5ForConditionalGeneration")]


def llama(dtype: torch.dtype = torch.float32) -> Any:
    model = make("LlamaForCausalLM", "LlamaConfig", TEXT)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + torch.rand_like(parameter))
    return model.to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in KINDS])
def test_it_loads_what_patch_gives(tmp_path: Path, row: Any, dtype: torch.dtype) -> None:
    kind, config, sizes, inputs = row
    source = make(kind, config, sizes).to(dtype)
    source.save_pretrained(tmp_path)
    got = getattr(transformers, kind).from_pretrained(tmp_path, quantization_config=upcast.UpcastConfig())
    assert_patched(got)
    assert relative_error(first_output(got, inputs), first_output(rounded(source), inputs)) < 1e-5
    assert not {"hf_quantizer", "quantization_method"} & vars(got).keys()
    assert not hasattr(got.config, "quantization_config")


@pytest.mark.parametrize("value", ["0", "1"])
def test_a_dictionary_is_as_good_as_the_class(
    folder: Path, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPCAST", value)
    got = AUTO.from_pretrained(folder, quantization_config={"quant_method": "upcast", "keep": ["lm_head"]})
    assert "lm_head.weight" not in half_weights(got)
    assert record(got).keep == ("lm_head",)
    assert "unpatched" not in capsys.readouterr().err


def test_a_float16_checkpoint_stays_mapped_as_with_our_own_loader(tmp_path: Path) -> None:
    llama(torch.float16).save_pretrained(tmp_path)
    got = AUTO.from_pretrained(tmp_path, quantization_config=upcast.UpcastConfig())
    ours = upcast.from_pretrained(AUTO, tmp_path)
    changes = [[(c.name, c.action) for c in record(model).plan.changes] for model in (got, ours)]
    assert changes[0] == changes[1]


def record(model: Any) -> Any:
    return upcast.patching.engine.record_of(model)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"policy": "sensitive"},
    {"policy": "none; model.layers.0=safe", "kv_cache": "float32"},
    {"keep": ["lm_head*", "*.mlp.*"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_was_asked_for_comes_back_with_a_plain_load(folder: Path, tmp_path: Path, options: Any) -> None:
    first = AUTO.from_pretrained(folder, quantization_config=upcast.UpcastConfig(**options))
    first.save_pretrained(tmp_path / "saved")
    again = AUTO.from_pretrained(tmp_path / "saved")
    assert str(record(again).policy) == str(record(first).policy)
    assert half_weights(again).keys() == half_weights(first).keys() != set()
    for (name, got), (_, want) in zip(again.named_parameters(), first.named_parameters(), strict=True):
        assert torch.equal(got.float(), want.float()), name
    with torch.no_grad():
        assert relative_error(again(IDS).logits, first(IDS).logits) < 1e-5


@pytest.mark.parametrize("policy", ["safe", "norm"])
def test_what_patch_patched_is_remembered_until_it_is_unpatched(
    tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = transformers.PreTrainedModel  # as it is before the first patch:
    monkeypatch.setattr(library, "save_pretrained", inspect.unwrap(library.save_pretrained))
    model = upcast.patch(llama(), policy=policy, keep=["lm_head"])
    model.save_pretrained(tmp_path / "patched")
    assert config_of(tmp_path / "patched")["quantization_config"] == {
        "quant_method": "upcast",
        "policy": policy,
        "keep": ["lm_head"],
        "upcast_version": upcast.__version__,
    }
    assert not hasattr(model.config, "quantization_config")
    upcast.unpatch(model).save_pretrained(tmp_path / "unpatched")
    assert "quantization_config" not in config_of(tmp_path / "unpatched")


def test_what_has_learned_is_loaded_with_all_its_digits(tmp_path: Path) -> None:
    model = upcast.patch(llama(), keep=["*.mlp.*"])
    head = model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        head.copy_(torch.randn_like(head))
    model.save_pretrained(tmp_path)
    again = AUTO.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, head)
    assert not torch.equal(head, head.half().float())
    assert half_weights(again).keys() == half_weights(model).keys() != set()
    assert config_of(tmp_path)["quantization_config"]["keep"] == ["*.mlp.*", "lm_head.weight"]


def test_where_upcast_is_not_installed_it_is_an_ordinary_float16_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("LlamaForCausalLM", "LlamaConfig", TEXT)  # its vectors are ones
    upcast.patch(source).save_pretrained(tmp_path)
    assert config_of(tmp_path)["dtype"] == "float16"
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "upcast", raising=False)
    plain = AUTO.from_pretrained(tmp_path)
    assert not half_weights(plain)
    assert {p.dtype for p in plain.parameters()} == {torch.float16}
    with torch.no_grad():
        assert relative_error(plain.float()(IDS).logits, source(IDS).logits) < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "policy": ({"policy": "saef"}, "'saef' is no op class"),
    "kv_cache": ({"kv_cache": "int8"}, "must be one of"),
    "keep": ({"keep": "lm_head"}, "must be a list of patterns"),
    "later": ({"bits": 4}, "'bits'; it has policy"),
    "method": ({"quant_method": "awq"}, "another quant_method"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_none_is_refused_when_it_is_made(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(upcast.UpcastError, match=message):
        upcast.UpcastConfig(**options)


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device_map": {"": "meta"}}, "device_map"),
    "dtype": ({"dtype": torch.float64}, "dtype"),
    "keep": ({"keep": ["nothing.of.it"]}, "nothing.of.it"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_it_cannot_serve_is_refused(folder: Path, case: str) -> None:
    options, message = CALLS[case]
    keep = options.pop("keep", []) if case == "keep" else []
    with pytest.raises(upcast.UpcastError, match=message):
        AUTO.from_pretrained(folder, quantization_config=upcast.UpcastConfig(keep=keep), **options)


@pytest.mark.parametrize("case", ["device", "dtype"])
def test_a_saved_model_gives_way_to_what_the_program_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    upcast.patch(llama()).save_pretrained(tmp_path)
    plain = AUTO.from_pretrained(tmp_path, **CALLS[case][0])
    assert not half_weights(plain)
    assert "is loaded as it is, unpatched" in capsys.readouterr().err


def test_a_config_that_names_a_file_as_its_policy_is_refused(tmp_path: Path) -> None:
    upcast.patch(llama()).save_pretrained(tmp_path)
    content = config_of(tmp_path)
    content["quantization_config"]["policy"] = "/dev/zero.json"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(upcast.UpcastError, match="no op class"):
        AUTO.from_pretrained(tmp_path)


def test_upcast_from_pretrained_overrides_what_the_checkpoint_says(tmp_path: Path) -> None:
    upcast.patch(llama(), policy="sensitive").save_pretrained(tmp_path)
    assert str(record(upcast.from_pretrained(AUTO, tmp_path)).policy) == "safe"


ARGUMENTS: dict[str, Any] = {
    "ours": upcast.UpcastConfig(policy="norm", keep=["lm_head"]),
    "dictionary": {"quant_method": "upcast", "policy": "norm", "keep": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_an_argument_wins_over_what_the_folder_says(tmp_path: Path, kind: str) -> None:
    upcast.patch(llama(), policy="sensitive").save_pretrained(tmp_path)
    got = AUTO.from_pretrained(tmp_path, quantization_config=ARGUMENTS[kind])  # a warning would be an error
    assert (str(record(got).policy), record(got).keep) == ("norm", ("lm_head",))
    with pytest.raises(upcast.UpcastError, match="Leave one of them out"):  # and gives way to nothing
        AUTO.from_pretrained(tmp_path, quantization_config=ARGUMENTS[kind], dtype=torch.float64)
    assert str(record(AUTO.from_pretrained(tmp_path)).policy) == "sensitive"


def test_an_argument_that_was_read_from_the_folder_asks_for_nothing_else(tmp_path: Path) -> None:
    """lm-eval hands a folder's own config to from_pretrained: it gives way as it does in the folder."""
    upcast.patch(llama(), policy="norm", keep=["lm_head"]).save_pretrained(tmp_path)
    read = auto.AutoQuantizationConfig.from_dict(config_of(tmp_path)["quantization_config"])
    assert record(AUTO.from_pretrained(tmp_path, quantization_config=read)).keep == ("lm_head",)
    assert not half_weights(AUTO.from_pretrained(tmp_path, quantization_config=read, dtype=torch.float64))


def test_a_config_of_another_kind_finds_ordinary_float16_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitsandbytes, torchao and the like quantize them, as they do where upcast is not installed."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        def __init__(self, **_: Any) -> None:
            self.quant_method = "other"

    class Quantizer(HfQuantizer):
        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            seen.append((self.pre_quantized, type(model.lm_head.weight), model.lm_head.weight.dtype))
            return model

        def is_serializable(self, *_: Any) -> bool:
            return True

        is_trainable = True

    seen: list[Any] = []
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "other", Config)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "other", Quantizer)
    upcast.patch(make("LlamaForCausalLM", "LlamaConfig", TEXT)).save_pretrained(tmp_path)
    AUTO.from_pretrained(tmp_path, quantization_config=Config())
    assert seen == [(False, torch.nn.Parameter, torch.float16)]


def test_generation_takes_it(folder: Path) -> None:
    got = AUTO.from_pretrained(folder, quantization_config=upcast.UpcastConfig())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(got.generate(IDS, **options), rounded(AUTO.from_pretrained(folder)).generate(IDS, **options))


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
before = "upcast" in sys.modules
model = AutoModelForCausalLM.from_pretrained("saved")
print(before, type(model.lm_head.weight).__name__, str(model.dtype))
torch.save(model(torch.arange(8)[None]).logits.detach().float(), "logits.pt")
"""
MEANT = {  # UPCAST -> whether upcast was there before, the weight's type
    "": ["False", "HalfWeight", "torch.float32"],
    "1": ["False", "HalfWeight", "torch.float32"],
    "0": ["False", "Parameter", "torch.float16"],
}


@pytest.mark.parametrize("value", ["", "0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_plain_script_that_never_names_upcast(
    python: Run, python_with_libraries: Run, tmp_path: Path, value: str
) -> None:
    model = upcast.patch(make("LlamaForCausalLM", "LlamaConfig", TEXT))
    model.save_pretrained(tmp_path / "saved")
    done = python("-c", PLAIN, UPCAST=value) if value else python_with_libraries("-c", PLAIN)
    assert done.stdout.split() == MEANT[value], done.stderr
    with torch.no_grad():
        want = model(torch.arange(8)[None]).logits
    assert relative_error(torch.load(tmp_path / "logits.pt"), want) < (2e-2 if value == "0" else 1e-5)
    shutil.rmtree(tmp_path / "saved")

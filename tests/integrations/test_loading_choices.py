"""What is kept or learns has all its digits, whatever loads it: keep, trainable, adapters and new heads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights, relative_error
from tests.integrations.test_loading import IDS, write
from tests.litgpt_checkpoints import small_config, write_checkpoint

transformers = pytest.importorskip("transformers")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


# --- keep and trainable -----------------------------------------------------------------------------------------------

PATTERNS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("LlamaForCausalLM", {"keep": ["lm_head"]}, {"lm_head.weight"}),
    ("LlamaForCausalLM", {"keep": ["*.q_proj", "model.layers.0.mlp"]}, {"q_proj", "layers.0.mlp"}),
    ("LlamaForCausalLM", {"trainable": ["*.layers.1"]}, {"layers.1."}),
    ("LlamaForCausalLM", {"keep": ["lm_head"], "trainable": ["*.v_proj"]}, {"lm_head", "v_proj"}),
    ("MixtralForCausalLM", {"keep": ["*.experts.gate_up_proj"]}, {"experts.gate_up_proj"}),
    ("MixtralForCausalLM", {"trainable": ["*.layers.0"]}, {"layers.0."}),
]


def as_environment(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, patterns in options.items():
        monkeypatch.setenv(f"UPCAST_{name.upper()}", ", ".join(patterns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("door", ["from_pretrained", "UPCAST=1"])
@pytest.mark.parametrize(("kind", "options", "named"), PATTERNS, ids=[str(row[1]) + row[0][0] for row in PATTERNS])
def test_what_is_kept_or_learns_has_all_its_digits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    kind: str,
    options: dict[str, Any],
    named: set[str],
    door: str,
    dtype: torch.dtype,
) -> None:
    folder = write(tmp_path, kind, dtype)
    want = dict(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
    if door == "UPCAST=1":
        request.getfixturevalue("upcast_1")
        as_environment(options, monkeypatch)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = upcast.from_pretrained(transformers.AutoModelForCausalLM, folder, **options)
    exact = {name for name in want if any(part in name for part in named)}
    assert half_weights(model).keys() == {name for name, p in want.items() if p.dim() >= 2} - exact
    for name, parameter in model.named_parameters():
        if name in exact or parameter.dim() < 2:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, want[name]), name
        else:
            assert torch.equal(parameter.detach() + 0, want[name].half().float()), name
    if "trainable" in options:
        learning = {name for name, p in model.named_parameters() if type(p) is nn.Parameter and p.requires_grad}
        assert {name for name in exact if "lm_head" not in name} <= learning


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["keep", "trainable"])
def test_load_litgpt_keeps_digits(tmp_path: Path, option: str, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), dtype)
    state = torch.load(folder / "lit_model.pth")
    model = upcast.load_litgpt(folder, **{option: ["lm_head", "transformer.h.1.mlp"]})
    exact = {name for name in state if "lm_head" in name or "h.1.mlp" in name}
    assert half_weights(model).keys() == {name for name, tensor in state.items() if tensor.dim() >= 2} - exact
    assert all(torch.equal(p, state[name].float()) for name, p in model.named_parameters() if name in exact)


def test_a_pattern_that_names_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upcast_1: None, capsys: Any
) -> None:
    folder = write(tmp_path)
    monkeypatch.setenv("UPCAST_KEEP", "lm_haed,lm_head")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "lm_head.weight" not in half_weights(model)
    assert "UPCAST_KEEP: 'lm_haed' matches no parameter of LlamaForCausalLM" in capsys.readouterr().err
    monkeypatch.setenv("UPCAST", "0")
    with pytest.raises(upcast.UpcastError, match="keep pattern 'lm_haed' matches no parameter"):
        upcast.from_pretrained(transformers.AutoModelForCausalLM, folder, keep=["lm_haed"])


def test_all_of_it_trainable_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upcast_1: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setenv("UPCAST_TRAINABLE", "*")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert capsys.readouterr().err.count("names all weights") == 1


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapters() -> dict[str, Any]:
    import peft

    return {
        "LoRA": peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
        "modules_to_save": peft.LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
        ),
        "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """Adapters of every kind on one float16 base, with the numbers that they hold."""
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    write(root / "base")
    made = {}
    for name, settings in adapters().items():
        base = transformers.AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        model = peft.get_peft_model(base, settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) / 7)
        model.save_pretrained(root / name)
        made[name] = (root / name, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    return made


def auto_peft(folder: Path) -> Any:
    import peft

    return peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def auto(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def on_top(folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(auto(folder.parent / "base"), folder)


def load_adapter(folder: Path) -> Any:
    model = auto(folder.parent / "base")
    model.load_adapter(str(folder))
    return model


def ours(folder: Path) -> Any:
    return upcast.from_pretrained(transformers.AutoModelForCausalLM, folder)


def ours_of_peft(folder: Path) -> Any:
    import peft

    return upcast.from_pretrained(peft.AutoPeftModelForCausalLM, folder)


OWN = {auto: ["LoRA", "IA3"], load_adapter: ["LoRA", "IA3"], ours: ["LoRA", "IA3"]}  # of Transformers' own loader
ADAPTERS = [
    (load, kind)
    for load in (auto_peft, on_top, ours_of_peft, auto, load_adapter, ours)
    for kind in OWN.get(load, ["LoRA", "modules_to_save", "IA3", "prompt", "prefix"])
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("load", "kind"), ADAPTERS, ids=[f"{load.__name__}-{kind}" for load, kind in ADAPTERS])
def test_an_adapter_s_numbers_are_not_rounded(
    adapted: Any, load: Callable[[Path], Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, numbers = adapted[kind]
    monkeypatch.setenv("UPCAST", "0")
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
    want = peft.PeftModel.from_pretrained(base, folder)
    monkeypatch.setenv("UPCAST", "1")
    from upcast.integrations.transformers import load as library

    library.install()
    model = load(folder)
    assert half_weights(model)
    found = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    for name, numbers_of_it in numbers.items():
        parameter = found[name.removeprefix("base_model.model.")]
        assert type(parameter) is nn.Parameter, name
        assert torch.equal(parameter, numbers_of_it), name
    with torch.inference_mode():
        # A prefix stands in the cache, as keys and values, and the cache is in float16.
        assert relative_error(model(IDS).logits, want(IDS).logits) < (1e-3 if kind == "prefix" else 1e-5)


# --- newly initialised heads ------------------------------------------------------------------------------------------

HEADS = {
    "sequence": ("AutoModelForSequenceClassification", {"num_labels": 3}),
    "one label": ("AutoModelForSequenceClassification", {"num_labels": 1}),
    "tokens": ("AutoModelForTokenClassification", {"num_labels": 5}),
    "answers": ("AutoModelForQuestionAnswering", {}),
    "mismatched": ("AutoModelForCausalLM", {"vocab_size": 400, "ignore_mismatched_sizes": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_is_drawn_as_unpatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upcast_1: None, head: str, dtype: torch.dtype
) -> None:
    name, options = HEADS[head]
    folder = write(tmp_path, dtype=dtype)

    def load() -> tuple[Any, float]:
        torch.manual_seed(11)
        model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
        return (model, info), float(torch.rand(()))

    (got, got_info), got_next = load()
    monkeypatch.setenv("UPCAST", "0")
    (want, want_info), want_next = load()
    assert got_info == want_info
    assert got_next == want_next
    assert got.config.num_labels == want.config.num_labels
    assert half_weights(got)
    new = {*want_info["missing_keys"], *(key[0] for key in want_info["mismatched_keys"])}
    assert new
    for key, parameter in want.named_parameters():
        near = 2e-2 if key in new and dtype != torch.float32 else 1e-3
        assert relative_error(dict(got.named_parameters())[key].float(), parameter.float()) < near, key

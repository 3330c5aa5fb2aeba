"""Loading changes nothing of what a program means: modes around it, arguments, heads, adapters, threads, and saving."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error
from tests.integrations.test_loading import IDS, KINDS, SIZES, float32_model, logits, mapped, write
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import make

transformers = pytest.importorskip("transformers")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def upcast_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """UPCAST=1, the hooks in place."""
    from upcast.integrations.transformers import load as ours

    ours.install()
    monkeypatch.setenv("UPCAST", "1")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# --- modes ------------------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "cpu": lambda: torch.device("cpu"),
}


def by_from_pretrained(folder: Path) -> nn.Module:
    model: nn.Module = upcast.from_pretrained(transformers.AutoModelForCausalLM, folder / "llama")
    return model


def by_patch(folder: Path) -> nn.Module:
    """Loaded outside, patched inside."""
    return upcast.patch(LOADED.pop())


def by_patch_of_an_inference_model(folder: Path) -> nn.Module:
    return upcast.patch(transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float16))


def by_load_litgpt(folder: Path) -> nn.Module:
    model: nn.Module = upcast.load_litgpt(folder / "litgpt")
    return model


LOADED: list[nn.Module] = []
WAYS = [by_from_pretrained, by_patch, by_patch_of_an_inference_model, by_load_litgpt]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modes")
    torch.manual_seed(0)
    write(root / "llama")
    write_checkpoint(root / "litgpt", small_config("SmolLM2-135M-Instruct"))
    return root


def output(model: nn.Module) -> torch.Tensor:
    result = model(IDS)
    tensor: torch.Tensor = result if isinstance(result, torch.Tensor) else result.logits
    return tensor


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_mode_around_loading_leaves_no_trace(folder: Path, way: Any, mode: str) -> None:
    LOADED[:] = [transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float16)]
    want = way(folder)
    LOADED[:] = [transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float16)]
    before = torch.get_default_dtype()
    with MODES[mode]():
        model = way(folder)
    assert torch.get_default_dtype() == before
    assert_patched(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in want.named_parameters()}
    buffers = {name: b.dtype for name, b in model.named_buffers()}
    if mode not in ("bfloat16", "float16", "float64") or way not in (by_patch_of_an_inference_model,):
        assert buffers == {name: b.dtype for name, b in want.named_buffers()}
    assert not any(weight.is_inference() or weight.stored.is_inference() for weight in half_weights(model).values())
    with torch.no_grad():
        assert relative_error(output(model), output(want)) < 1e-6
    assert mapped(model, folder) == mapped(want, folder)  # nothing was written back: the pages are the file's


@pytest.mark.parametrize("way", WAYS[:2] + WAYS[3:], ids=lambda way: way.__name__)
def test_gradients_flow_after_inference_mode(folder: Path, way: Any) -> None:
    LOADED[:] = [transformers.AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float16)]
    with torch.inference_mode():
        model = way(folder)
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x = torch.randn(3, linear.weight.shape[1], requires_grad=True)
    linear.requires_grad_(False)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.detach().sum(0).expand(3, -1), atol=1e-4)


def test_reading_a_weight_in_inference_mode_writes_nothing(folder: Path) -> None:
    with torch.inference_mode():
        model = by_from_pretrained(folder)
        weight = next(iter(half_weights(model).values()))
        version = weight.stored._version
        _ = (weight + 1, weight.sum(), torch.linalg.norm(weight), weight.sort())
    assert weight.stored._version == version


def test_under_a_meta_device_the_library_s_own_error_comes(folder: Path, upcast_1: None) -> None:
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device"):
        transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")


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


# --- arguments and classes of the user's own --------------------------------------------------------------------------


class Mine(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    """A user's class: an argument, a layer, a buffer and an initialisation of its own."""

    def __init__(self, config: Any, scale: float = 1.0) -> None:
        super().__init__(config)
        self.scale = scale
        self.extra = nn.Linear(config.hidden_size, 24)
        self.register_buffer("table", torch.linspace(0, 1, 7) / 3, persistent=False)
        self.register_buffer("counts", torch.arange(5))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and module.out_features == 24:
            nn.init.constant_(module.weight, 0.125)
        if isinstance(module, Mine):
            module.table.copy_(torch.linspace(0, 1, 7) / 3)
            module.counts.copy_(torch.arange(5))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


LLAMA = transformers.LlamaForCausalLM
CALLS: dict[str, Callable[[Path], Any]] = {
    "auto": lambda folder: LLAMA.from_pretrained(folder, dtype="auto"),
    "float16": lambda folder: LLAMA.from_pretrained(folder, dtype=torch.float16),
    "device_map": lambda folder: LLAMA.from_pretrained(folder, device_map="cpu"),
    "low memory": lambda folder: LLAMA.from_pretrained(folder, low_cpu_mem_usage=True),
    "config": lambda folder: LLAMA.from_pretrained(folder, config=transformers.AutoConfig.from_pretrained(folder)),
    "eager": lambda folder: LLAMA.from_pretrained(folder, attn_implementation="eager"),
    "use_cache": lambda folder: LLAMA.from_pretrained(folder, use_cache=False),
    "state_dict": lambda folder: LLAMA.from_pretrained(
        None, config=transformers.AutoConfig.from_pretrained(folder), state_dict=state_of(folder)
    ),
    "base": transformers.AutoModel.from_pretrained,
    "tied": lambda folder: LLAMA.from_pretrained(folder, tie_word_embeddings=True),
    "mine": lambda folder: Mine.from_pretrained(folder, scale=2.0),
    "key_mapping": lambda folder: LLAMA.from_pretrained(folder, key_mapping={"^nothing": "something"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_calls_mean_what_they_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upcast_1: None, call: str, dtype: torch.dtype
) -> None:
    folder = write(tmp_path, dtype=dtype)
    got = CALLS[call](folder)
    monkeypatch.setenv("UPCAST", "0")
    want = CALLS[call](folder)
    assert half_weights(got)
    assert type(got) is type(want)
    assert got.training == want.training
    assert [name for name, _ in got.named_parameters()] == [name for name, _ in want.named_parameters()]
    assert list(got.state_dict()) == list(want.state_dict())
    assert got.config._attn_implementation == want.config._attn_implementation
    assert getattr(got, "scale", None) == getattr(want, "scale", None)
    for name, parameter in got.named_parameters():
        assert relative_error(parameter, dict(want.named_parameters())[name].float()) < 1e-3, name
        assert parameter.requires_grad == dict(want.named_parameters())[name].requires_grad
    for name, buffer in got.named_buffers():
        assert relative_error(buffer.float(), dict(want.named_buffers())[name].float()) < 1e-2, name
    if isinstance(want, Mine):
        assert got.table.dtype == torch.float32
        assert torch.equal(got.table, torch.linspace(0, 1, 7) / 3)
        assert torch.equal(got.counts, want.counts)
        assert torch.equal(got.extra.weight.detach() + 0, want.extra.weight.float())


def test_what_is_not_loaded_is_not_patched(upcast_1: None) -> None:
    config = transformers.LlamaConfig(**SIZES)
    for model in (transformers.AutoModelForCausalLM.from_config(config), LLAMA(config)):
        assert not half_weights(model)


def test_threads_load_at_once(tmp_path: Path, upcast_1: None) -> None:
    folders = [write(tmp_path / str(i), list(KINDS)[i % 2], DTYPES[i % 3]) for i in range(6)]
    want = [logits(float32_model(folder)) for folder in folders]
    found: dict[int, Any] = {}

    def load(index: int) -> None:
        found[index] = transformers.AutoModelForCausalLM.from_pretrained(folders[index])

    import os

    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
    for index, expected in enumerate(want):
        assert_patched(found[index])
        assert relative_error(logits(found[index]), expected) < 1e-5


# --- saving -----------------------------------------------------------------------------------------------------------

SAVED = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float16,  # its norms are ones here, which float16 holds
    torch.float32: torch.float16,
}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_config_names_the_dtype_of_the_weights(
    tmp_path: Path, kind: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    model = upcast.from_pretrained(transformers.AutoModelForCausalLM, write(tmp_path / "a", kind, dtype))
    before = model.config.to_dict()
    model.save_pretrained(tmp_path / "b", **options)
    assert "save_pretrained" not in vars(model.config)
    assert str(model.config.dtype) in ("float32", "torch.float32")
    assert model.config.to_dict().keys() == before.keys()
    content = json.loads((tmp_path / "b" / "config.json").read_text())
    assert content["dtype"] == "float16"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert {p.dtype for p in plain.parameters()} == {torch.float16}
    again = upcast.from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    assert relative_error(logits(plain.float()), logits(model)) < 1e-5


def test_what_float16_would_lose_is_saved_and_named_float32(tmp_path: Path) -> None:
    model = make("LlamaForCausalLM", "LlamaConfig", SIZES)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.randn(64))
    upcast.patch(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.model.norm.weight, model.model.norm.weight)
    assert relative_error(logits(plain), logits(model)) < 1e-6


def test_parts_of_a_config_are_named_too(tmp_path: Path) -> None:
    text = {**SIZES, "model_type": "llama"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    transformers.LlavaForConditionalGeneration(config).half().save_pretrained(tmp_path / "a")
    model = upcast.from_pretrained(transformers.LlavaForConditionalGeneration, tmp_path / "a")
    assert half_weights(model)
    model.save_pretrained(tmp_path / "b")
    transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "c")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("c", "b")]
    for part in ("text_config", "vision_config"):
        assert written[1][part].get("dtype") == written[0][part].get("dtype")
    assert written[1]["dtype"] == written[0]["dtype"] == "float16"


def test_an_unpatched_model_is_saved_as_ever(tmp_path: Path) -> None:
    upcast.from_pretrained(transformers.AutoModelForCausalLM, write(tmp_path / "a"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_llm_save_and_fabric_save(tmp_path: Path) -> None:
    pytest.importorskip("litgpt")
    from lightning import Fabric
    from litgpt import LLM

    folder = write_checkpoint(tmp_path / "a", small_config("SmolLM2-135M-Instruct"))
    llm = LLM.load(str(folder), distribute=None)
    model = upcast.load_litgpt(folder)
    fabric = Fabric(accelerator="cpu", devices=1)
    llm.model, llm.fabric = fabric.setup_module(model), fabric
    llm.save(tmp_path / "b")
    fabric.save(tmp_path / "c.pth", {"model": llm.model})
    with torch.inference_mode():
        want = model(IDS)
        assert torch.equal(upcast.load_litgpt(tmp_path / "b")(IDS), want)
    state = torch.load(tmp_path / "c.pth")["model"]
    source = torch.load(folder / "lit_model.pth")
    assert {name.removeprefix("_forward_module.") for name in state} == set(source)
    for name, tensor in state.items():
        assert torch.equal(tensor.float(), source[name.removeprefix("_forward_module.")].float()), name

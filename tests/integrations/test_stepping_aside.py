"""A failure in an automatic hook breaks no program: one line, and the library goes its own way.

Every door of UPCAST=1 is run once unpatched, once patched, and once for each of our functions on its way, which is made
to fail. The program then has exactly what it has without upcast: the same tensors, dtypes and random numbers.
"""

import contextlib
import random
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import IDS, TEXT, make
from upcast.core.errors import describe
from upcast.integrations import stepping_aside

transformers = pytest.importorskip("transformers")
pytest.importorskip("litgpt")

SIZES = {**TEXT, "hidden_size": 64, "vocab_size": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bfloat16 checkpoint of Transformers and one of LitGPT, which a half-done load would round."""
    root = tmp_path_factory.mktemp("aside")
    torch.manual_seed(0)
    make("LlamaForCausalLM", "LlamaConfig", SIZES).to(torch.bfloat16).save_pretrained(root / "llama")
    write_checkpoint(root / "litgpt", small_config("SmolLM2-135M-Instruct"), torch.bfloat16)
    return root


# --- the doors: each returns the model that the program has in the end ------------------------------------------------


def causal_lm(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "llama")


def new_head(folder: Path) -> nn.Module:
    """A model whose head is not in the checkpoint: it is drawn at random."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=16)


def llm_load(folder: Path) -> nn.Module:
    from litgpt import LLM

    return LLM.load(str(folder / "litgpt"))


def llm_distribute(folder: Path) -> nn.Module:
    from litgpt import LLM

    llm = LLM.load(str(folder / "litgpt"), distribute=None)
    llm.distribute(accelerator="cpu", precision="bf16-true", fixed_kv_cache_size=40)
    return llm


@torch.inference_mode()
def script(folder: Path) -> nn.Module:
    """What ``litgpt generate`` does between its arguments and its prompt."""
    from lightning import Fabric
    from litgpt import GPT, Config
    from litgpt.generate import base

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module(empty_init=True):
        model = GPT(Config.from_file(folder / "litgpt" / "model_config.yaml"))
    with fabric.init_tensor():
        model.set_kv_cache(batch_size=1)
    model = fabric.setup_module(model.eval())
    base.load_checkpoint(fabric, model, folder / "litgpt" / "lit_model.pth")
    return model


def lora(folder: Path) -> nn.Module:
    """What ``litgpt finetune_lora`` does before it trains."""
    from lightning import Fabric
    from litgpt.finetune import lora as script
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    fabric = Fabric(accelerator="cpu", devices=1, precision=script.get_default_supported_precision(training=True))
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_value": True}
    with fabric.init_module(empty_init=False):
        model = GPT(Config.from_file(folder / "litgpt" / "model_config.yaml", **settings))
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    fabric.setup_optimizers(script.instantiate_torch_optimizer("AdamW", model.parameters()))
    script.load_checkpoint(fabric, model, folder / "litgpt" / "lit_model.pth", strict=False)
    return model


TRANSFORMERS = [
    "upcast.patching.engine.adopt",
    "upcast.patching.engine._patch",
    "upcast.patching.engine.decisions",
    "upcast.patching.hooks.install",
    "upcast.patching.trainable.check",
    "upcast.kernels.survey",
    "upcast.integrations.loading.give_back_pages",
    "upcast.integrations.loading.Loading.arrive",
    "upcast.integrations.loading.Loading.adopt",
    "upcast.integrations.loading.check_arguments",
    "upcast.integrations.transformers.load._read",
    "upcast.integrations.transformers.load._parts",
    "upcast.integrations.transformers.load.Arriving.to",
    "upcast.integrations.transformers.load.Arriving.__getitem__",
    "upcast.core.pages.read_ahead",
]
LITGPT = [
    "upcast.patching.engine.adopt",
    "upcast.patching.engine._patch",
    "upcast.patching.hooks.install",
    "upcast.patching.trainable.mark",
    "upcast.checkpoint.reading.read",
    "upcast.checkpoint.reading.to_float16",
    "upcast.integrations.litgpt.load.arguments",
]
API = [*LITGPT, "upcast.integrations.litgpt.load._place", "upcast.integrations.litgpt.load.load_litgpt"]
SCRIPT = [*LITGPT, "upcast.integrations.litgpt.scripts.not_ours", "upcast.integrations.loading.patterns"]
# door -> (the modules that activate it, what may fail on its way)
DOORS: dict[Callable[[Path], nn.Module], tuple[list[str], list[str]]] = {
    causal_lm: (["transformers.modeling_utils"], TRANSFORMERS),
    new_head: (["transformers.modeling_utils"], TRANSFORMERS),
    llm_load: (["litgpt.api"], API),
    llm_distribute: (["litgpt.api"], [*API[:-3], *API[-2:], "upcast.integrations.litgpt.load.accelerator"]),
    script: (
        ["litgpt.generate.base"],
        [*SCRIPT, "upcast.integrations.litgpt.scripts._fill", "upcast.integrations.litgpt.scripts._compute_in_float32"],
    ),
    lora: (
        ["litgpt.finetune.lora"],
        [name for name in SCRIPT if not name.endswith("load.arguments")]
        + ["upcast.integrations.litgpt.finetune._read", "upcast.integrations.litgpt.finetune._fill"],
    ),
}
CASES = [(door, name) for door, (_, names) in DOORS.items() for name in names]


@pytest.fixture(scope="module")
def activated() -> Iterator[None]:
    """The wrappers that the start-up file installs; other tests of this process do not see them."""
    import importlib

    from upcast.integrations import activation

    modules = [importlib.import_module(name) for name in ("transformers.modeling_utils", "litgpt.api")]
    modules += [importlib.import_module(name) for name in ("litgpt.generate.base", "litgpt.finetune.lora")]
    before = [(owner, dict(vars(owner))) for module in modules for owner in (module, getattr(module, "LLM", module))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPCAST", "1")
        for module in modules:
            activation.activate(module)
    yield
    for owner, names in before:
        for name, value in names.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


def outcome(door: Callable[[Path], nn.Module], folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Run a door; return its model, and what the program could tell of it and of the random numbers that follow."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    model = door(folder)
    inner = upcast.patching.discovery.unwrap(model)
    state = {name: (tensor.dtype, tensor.clone()) for name, tensor in inner.state_dict().items()}
    grads = {name: (parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()}
    buffers = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in model.named_buffers()}
    found = {
        "state": state,
        "grads": grads,
        "buffers": buffers,
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[len(module._forward_pre_hooks), len(module._state_dict_hooks)] for module in model.modules()],
        "next": (float(torch.rand(())), random.random(), float(np.random.rand())),
        "dtype": str(getattr(getattr(model, "config", None), "dtype", None)),
        "default": torch.get_default_dtype(),
    }
    return model, found


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    (got_state, want_state) = (got.pop("state"), dict(want)["state"])
    assert list(got_state) == list(want_state)
    for name, (dtype, tensor) in got_state.items():
        assert (dtype, torch.equal(tensor, want_state[name][1])) == (want_state[name][0], True), name
    assert got == {key: value for key, value in want.items() if key != "state"}


@pytest.fixture(scope="module")
def unpatched(folder: Path) -> Callable[[Callable[[Path], nn.Module]], dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}

    def of(door: Callable[[Path], nn.Module]) -> dict[str, Any]:
        if door not in known:
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("UPCAST", raising=False)
                known[door] = outcome(door, folder)[1]
        return known[door]

    return of


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("upcast")]


def failing(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Have the function of this name raise what nobody expects; return where it notes that it did."""
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append(name)
        raise AttributeError("planted")

    monkeypatch.setattr(name, fail)
    return calls


# LitGPT's plain hooks are on for whichever library was activated, so that a model is patched where nothing fails.
pytestmark = [
    pytest.mark.usefixtures("activated"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_the_door_is_ours_while_nothing_fails(
    folder: Path, door: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPCAST", "1")
    model, _ = outcome(door, folder)
    assert half_weights(model)
    assert len(lines(capsys)) == 1


@pytest.mark.parametrize(("door", "name"), CASES, ids=[f"{door.__name__}-{name[7:]}" for door, name in CASES])
def test_what_fails_leaves_the_program_as_it_is(
    folder: Path, unpatched: Any, door: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    want = unpatched(door)
    monkeypatch.setenv("UPCAST", "1")
    calls = failing(monkeypatch, name)
    model, got = outcome(door, folder)
    assert calls
    assert not half_weights(model)
    said = lines(capsys)
    assert len(said) == 1, said
    assert " as it is, unpatched: " in said[0]
    assert "planted" in said[0]
    if door is lora:  # the script had asked for its precision before, and was told float32, in which adapters learn
        want = {**want, **{key: got[key] for key in ("state", "grads", "buffers")}}
    assert_same(got, want)


def test_a_library_s_own_error_is_passed_on_without_a_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litgpt import LLM

    monkeypatch.setenv("UPCAST", "1")
    for load in (
        lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
        lambda: transformers.LlamaForCausalLM.from_pretrained(folder / "llama", no_such_argument=1),
        lambda: LLM.load(str(folder / "litgpt"), init="no such way"),
        lambda: LLM.load(str(folder / "litgpt"), no_such_argument=1),
    ):
        with pytest.raises((OSError, ValueError, TypeError)):
            load()
    assert lines(capsys) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_an_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    monkeypatch.setenv("UPCAST", "1")

    def interrupted(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("upcast.patching.engine.adopt", interrupted)
    with pytest.raises(error):
        causal_lm(folder)


def test_a_wrong_variable_after_the_start_breaks_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCAST", "1")
    monkeypatch.setenv("UPCAST_VERBOSE", "loud")
    assert not half_weights(causal_lm(folder))


# --- fast ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "fails"),
    [
        (causal_lm, "transformers.install.TransformersModels.install"),
        (causal_lm, "transformers.install._fuse"),
        (llm_load, "litgpt.install.LitGPTModels.install"),
        (llm_load, "litgpt.install._fuse"),
    ],
)
def test_a_fast_way_that_fails_costs_only_itself(
    folder: Path, unpatched: Any, door: Any, fails: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("UPCAST", "1")
    calls = failing(monkeypatch, f"upcast.integrations.{fails}")
    model, _ = outcome(door, folder)
    assert calls
    assert half_weights(model)
    said = lines(capsys)
    assert len(said) == 2, said
    assert "runs without its fast ways" in said[0]
    assert "planted" in said[0]
    assert not [m for m in model.modules() if type(vars(m).get("forward")).__name__.startswith("Fused")]
    want = {name: tensor for name, (_, tensor) in unpatched(door)["state"].items()}
    for key, tensor in upcast.patching.discovery.unwrap(model).state_dict().items():
        assert torch.equal(tensor.float(), want[key].half().float()), key


def test_a_cache_that_cannot_be_downcast_stays_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UPCAST", "1")
    model: Any = causal_lm(folder)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    want = model.generate(IDS, **options)
    lines(capsys)
    calls = failing(monkeypatch, "upcast.integrations.transformers.install.downcast")
    got = model.generate(IDS, **options)
    assert calls
    assert torch.equal(got, want)
    assert len(lines(capsys)) == 1
    model.generate(IDS, **options)
    assert lines(capsys) == []


# --- versions of LitGPT that lack something ---------------------------------------------------------------------------

MISSING = [
    ("litgpt.model", "LLaMAMoE"),
    ("litgpt.generate.base", "batched_next_token"),
]


@pytest.mark.parametrize(("module", "name"), MISSING, ids=[name for _, name in MISSING])
def test_another_version_of_litgpt(
    folder: Path, module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a version without one of these: models are patched, and run LitGPT's own forwards."""
    monkeypatch.setenv("UPCAST", "1")
    want = llm_load(folder)
    monkeypatch.delattr(f"{module}.{name}")
    llm = llm_load(folder)
    assert half_weights(llm)
    with torch.inference_mode():
        assert torch.allclose(llm.model(IDS), want.model(IDS), rtol=1e-4, atol=1e-5)
    assert len(lines(capsys)) == 2
    remarks = upcast.plan(llm).remarks
    assert any("this version of it has no class" in line for line in remarks) is (module == "litgpt.model")


# --- the tools --------------------------------------------------------------------------------------------------------


def test_nothing_is_missing_in_this_version_of_litgpt() -> None:
    import litgpt.model

    from upcast.integrations.litgpt.versions import why_unfused

    assert why_unfused(litgpt.model) == ""


def test_activation_wraps_all_or_nothing() -> None:
    module = types.ModuleType("library")
    module.first = first = lambda: 1  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        stepping_aside.wrap(module, {"first": lambda *_: 2, "second": lambda *_: 2})
    assert module.first is first


def test_undoing_goes_back_to_every_dictionary() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    states = [(module, {key: id(value) for key, value in vars(module).items()}) for module in model.modules()]
    weight = model[0].weight
    with contextlib.suppress(ZeroDivisionError), stepping_aside.undone_if_it_fails(model):
        model[0].weight = nn.Parameter(torch.zeros(4, 3))
        model[1] = nn.Identity()
        model.register_forward_pre_hook(lambda *_: None)
        model.extra = 1
        del model[0].bias
        _ = 1 / 0
    assert model[0].weight is weight
    assert model[0].bias is not None
    assert isinstance(model[1], nn.Linear)
    assert [(module, {key: id(value) for key, value in vars(module).items()}) for module in model.modules()] == states


def test_the_line_names_the_kind_of_an_unexpected_error() -> None:
    assert describe(KeyError("weight")) == "KeyError: 'weight'"
    assert describe(ValueError()) == "ValueError"
    assert describe(upcast.UpcastError("what it says")) == "what it says"
    assert describe(RuntimeError("two\nlines")) == "RuntimeError: two lines"

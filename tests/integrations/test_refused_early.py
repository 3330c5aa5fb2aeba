"""What UPCAST=1 cannot do is refused before a weight is read: one line, and the model that the library loads by itself.

Every door is run unpatched, and with variables that name nothing of its model. The program then has exactly what it has
without upcast: no tensor is left in float16 between others in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights
from tests.integrations.test_stepping_aside import (
    SIZES,
    activated,
    assert_same,
    causal_lm,
    lines,
    llm_distribute,
    llm_load,
    new_head,
    outcome,
    script,
)
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import IDS, make

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytest.importorskip("litgpt")
__all__ = ["activated"]

pytestmark = [
    pytest.mark.usefixtures("activated", "diffusion"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    found = {}
    for dtype in DTYPES:
        root = found[dtype] = tmp_path_factory.mktemp("early")
        model = make("LlamaForCausalLM", "LlamaConfig", SIZES).to(dtype)
        model.save_pretrained(root / "llama")
        model.name_or_path = str(root / "llama")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"])
        peft.get_peft_model(model, settings).save_pretrained(root / "adapter")
        unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **BLOCKS).to(dtype)
        diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(root / "pipeline")
        write_checkpoint(root / "litgpt", small_config("SmolLM2-135M-Instruct"), dtype)
    return found


@pytest.fixture(scope="module")
def diffusion(activated: None) -> Any:
    """Diffusers' loaders as the start-up file leaves them."""
    from diffusers.models import model_loading_utils, modeling_utils

    from upcast.integrations import diffusers as ours

    owners = (model_loading_utils, modeling_utils.ModelMixin)
    before = [(owner, dict(vars(owner))) for owner in owners]
    ours.activate(modeling_utils)
    diffusers.utils.logging.disable_progress_bar()  # which would stand before our line
    yield
    diffusers.utils.logging.enable_progress_bar()
    for owner, names in before:
        for name, value in names.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)


# --- doors beside those of tests/test_stepping_aside.py ---------------------------------------------------------------


def pipeline(folder: Path) -> nn.Module:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    model: nn.Module = transformers.pipeline("text-generation", str(folder / "llama"), tokenizer=tokenizer).model
    return model


def with_adapter(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")


def peft_model(folder: Path) -> nn.Module:
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")


def state_dict(folder: Path) -> nn.Module:
    from safetensors.torch import load_file

    state = load_file(folder / "llama" / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder / "llama")
    return transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


def diffusion_model(folder: Path) -> nn.Module:
    return diffusers.UNet2DModel.from_pretrained(folder / "pipeline" / "unet")


def diffusion_pipeline(folder: Path) -> nn.Module:
    unet: nn.Module = diffusers.DDPMPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float16).unet
    return unet


TEXT_DOORS = (causal_lm, new_head, pipeline, with_adapter, peft_model, state_dict)
LIT_DOORS = (llm_load, llm_distribute, script)
DOORS = (*TEXT_DOORS, *LIT_DOORS, diffusion_model, diffusion_pipeline)
REFUSED = {  # variables, and what the line says
    "pattern": ({"UPCAST_POLICY": "none; no.such.module=safe"}, "'no.such.module' matches no module"),
    "file": ({"UPCAST_POLICY": "policy.json"}, "was measured on a Mamba of 9 parameters"),
    "all learn": ({"UPCAST_TRAINABLE": "*"}, "names all weights"),
}
# What may not be called any more; what the library itself reads is not ours. A LitGPT checkpoint is mapped before: what
# it holds bounds the model that is built.
FILLERS = ("upcast.integrations.litgpt.load.fill", "upcast.integrations.loading.Loading.adopt")
READERS = (
    "upcast.checkpoint.reading.read",
    "upcast.integrations.transformers.load._read",
    "upcast.integrations.loading.Loading.arrive",
    "upcast.integrations.loading.Loading.adopt",
    "upcast.core.pages.read_ahead",
)


def refuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str]) -> None:
    architecture = {"model": "Mamba", "parameters": 9, "hash": "0" * 16}
    (tmp_path / "policy.json").write_text(json.dumps({"policy": "none", "architecture": architecture}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPCAST", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def watched(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> list[str]:
    """Return where the functions note that they were called; they do nothing then."""
    called: list[str] = []
    for name in names:
        monkeypatch.setattr(name, lambda *_, name=name: called.append(name))
    return called


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_nothing_is_read_that_cannot_be_used(
    folders: dict[torch.dtype, Path],
    door: Callable[[Path], nn.Module],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("UPCAST", raising=False)
    want = outcome(door, folders[dtype])[1]
    for variables, says in REFUSED.values():
        with monkeypatch.context() as patch:
            refuse(patch, tmp_path, variables)
            called = watched(patch, FILLERS if door in LIT_DOORS else READERS)
            model, got = outcome(door, folders[dtype])
        assert called == []
        assert not half_weights(model)
        said = lines(capsys)
        assert len(said) == 1, said
        assert " as it is, unpatched: " in said[0]
        assert says in said[0]
        assert_same(got, want)


def test_a_policy_of_the_same_class_is_compared_when_weights_are_tied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While it is loaded, a model may count weights twice that are one in the end."""
    model = make("LlamaForCausalLM", "LlamaConfig", {**SIZES, "tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "llama")
    for architecture, patched in ((upcast.policy.fingerprint.of(model), True), ({"model": "LlamaForCausalLM"}, False)):
        (tmp_path / "policy.json").write_text(json.dumps({"policy": "sensitive", "architecture": architecture}))
        monkeypatch.setenv("UPCAST", "1")
        monkeypatch.setenv("UPCAST_POLICY", str(tmp_path / "policy.json"))
        loaded = causal_lm(tmp_path)
        assert bool(half_weights(loaded)) is patched
        assert ("unpatched" in lines(capsys)[-1]) is not patched
        with torch.inference_mode():
            assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"policy": "none; no.such.module=safe"}, {"keep": ["no_such"]}, {"trainable": ["no_such"]}, {"trainable": ["*"]}],
    ids=str,
)
@pytest.mark.parametrize("door", ["transformers", "litgpt"])
def test_calls_of_our_own_raise_as_early(
    folders: dict[torch.dtype, Path], door: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called, folder = watched(monkeypatch, READERS if door == "transformers" else FILLERS), folders[torch.bfloat16]
    loaders: dict[str, Callable[[], Any]] = {
        "transformers": lambda: upcast.from_pretrained(transformers.LlamaForCausalLM, folder / "llama", **options),
        "litgpt": lambda: upcast.load_litgpt(folder / "litgpt", **options),
    }
    with pytest.raises(upcast.UpcastError, match=r"matches no|names all weights"):
        loaders[door]()
    assert called == []

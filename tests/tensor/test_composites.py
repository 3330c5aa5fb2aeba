"""Models that are composed of others, of which some were patched when they were loaded: report, plan and unpatch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights, relative_error
from tests.litgpt_checkpoints import small_config, write_checkpoint
from tests.transformers_models import IDS, TEXT, make
from upcast.patching.parts import parts_of

transformers = pytest.importorskip("transformers")

SIZES = {**TEXT, "vocab_size": 320}
LLAMA = ("LlamaForCausalLM", "LlamaConfig", SIZES)
BERT = ("BertModel", "BertConfig", SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composites")
    torch.manual_seed(0)
    make(*LLAMA).half().save_pretrained(root / "llama")
    make(*BERT).half().save_pretrained(root / "bert")
    decoder = ("BertLMHeadModel", "BertConfig", {**SIZES, "is_decoder": True, "add_cross_attention": True})
    make(*decoder).half().save_pretrained(root / "decoder")
    write_checkpoint(root / "litgpt", small_config("pythia-160m"))
    return root


def load(kind: str, folder: Path) -> Any:
    return upcast.from_pretrained(getattr(transformers, kind), folder)


# --- what is composed, and the names of its patched parts -------------------------------------------------------------


class Sentences(nn.Module):
    """As sentence-transformers has it: a Sequential of wrappers, the first of which holds an AutoModel."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.auto_model = load("AutoModel", folder / "bert")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.auto_model(input_ids=ids).last_hidden_state
        return hidden


class Two(nn.Module):
    """Two patched models, a layer of one's own, and a weight that is tied to one of theirs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.first, self.second = load("AutoModel", folder / "bert"), load("AutoModelForCausalLM", folder / "llama")
        self.head = nn.Linear(32, 320, bias=False)
        self.head.weight = self.second.lm_head.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(input_ids=ids).last_hidden_state) + self.second(input_ids=ids).logits


def encoder_decoder(folder: Path) -> nn.Module:
    from upcast.integrations.transformers import load as ours

    ours.install()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UPCAST", "1")
        model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(folder / "bert", folder / "decoder")
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


def llm(folder: Path) -> nn.Module:
    from litgpt import LLM

    return LLM(upcast.load_litgpt(folder / "litgpt"))


def sentences(folder: Path) -> nn.Module:
    return nn.Sequential(Sentences(folder), nn.Linear(32, 8))


def listed(folder: Path) -> nn.Module:
    return nn.ModuleList([load("AutoModel", folder / "bert"), nn.Linear(4, 4), load("AutoModel", folder / "llama")])


MADE: dict[Callable[[Path], Any], list[str]] = {
    encoder_decoder: ["encoder", "decoder"],
    sentences: ["0.auto_model"],
    Two: ["first", "second"],
    listed: ["0", "2"],
    llm: ["model"],
    lambda folder: load("AutoModel", folder / "bert"): [""],
}
ROWS = [pytest.param(make, names, id="+".join(names) or "itself") for make, names in MADE.items()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "names"), ROWS)
def test_each_part_is_reported(folder: Path, make: Any, names: list[str]) -> None:
    model = make(folder)
    assert [part.name for part in parts_of(model)] == names
    text = upcast.report(model)
    assert text.count("kernels: ") == text.count("upcast whole: ") == len(names)
    for name in filter(None, names):
        assert f"{name}: " in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "names"), ROWS)
def test_the_plan_tells_what_was_done_and_what_would_be(folder: Path, make: Any, names: list[str]) -> None:
    model = make(folder)
    plan = upcast.plan(model)
    changes = {change.name: change.action for change in plan.changes}
    owned = {name for name, p in model.named_parameters() if not any(name.startswith(f"{n}.") or not n for n in names)}
    assert owned <= changes.keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {name for name in changes if name in parameters} == changes.keys() - dict(model.named_buffers()).keys()
    assert any("patched already" in line for line in plan.remarks)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "names"), ROWS)
def test_unpatching_undoes_every_part(folder: Path, make: Any, names: list[str]) -> None:
    model = make(folder)
    assert half_weights(model)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = {frozenset(n for n, i in before.items() if i == each) for each in before.values()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert upcast.unpatch(model) is model
    assert not half_weights(model)
    assert not parts_of(model)
    after = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert {frozenset(n for n, i in after.items() if i == each) for each in after.values()} == tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), state[name].float()), name
    assert not [m for m in model.modules() if "forward" in vars(m) and "upcast" in type(vars(m)["forward"]).__module__]
    with pytest.raises(upcast.UpcastError, match="not patched"):
        upcast.unpatch(model)
    upcast.patch(model.float())  # now as a whole
    assert half_weights(model)


def test_an_interrupted_unpatch_leaves_every_part_patched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two(folder)
    weights = {name: id(weight) for name, weight in half_weights(model).items()}
    original, count = upcast.patching.engine._before, 0

    def failing(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 60:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(upcast.patching.engine, "_before", failing)
    with pytest.raises(KeyboardInterrupt):
        upcast.unpatch(model)
    assert {name: id(weight) for name, weight in half_weights(model).items()} == weights
    assert len(parts_of(model)) == 2


def test_the_parts_compute_as_before(folder: Path) -> None:
    """In float32 on the same rounded weights, whole and after unpatching."""
    model = Two(folder)
    with torch.inference_mode():
        got = model(IDS)
        want = upcast.unpatch(model).float()(IDS)
    assert relative_error(got, want) < 1e-5


def test_an_encoder_decoder_under_upcast_1_generates(folder: Path) -> None:
    model: Any = encoder_decoder(folder)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    got = model.generate(IDS, **options)
    assert torch.equal(got, upcast.unpatch(model).float().generate(IDS, **options))


@pytest.mark.parametrize("given", [nn.Linear(3, 4), nn.Sequential()], ids=["linear", "empty"])
def test_what_has_no_patched_part_is_an_error(given: nn.Module) -> None:
    for function in (upcast.report, upcast.unpatch):
        with pytest.raises(upcast.UpcastError, match=r"not patched by upcast.*Call upcast.patch"):
            function(given)


def test_a_part_of_a_part_is_not_the_model(folder: Path) -> None:
    model = load("AutoModelForCausalLM", folder / "llama")
    assert "a piece of a patched LlamaForCausalLM" in upcast.report(model.model.layers)
    with pytest.raises(upcast.UpcastError, match="a piece of a patched LlamaForCausalLM"):
        upcast.diagnose(model.model.layers[0].mlp, torch.randn(2, 32))


# --- Diffusers: a pipeline is no module -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from tests.coverage_table.diffusion import BLOCKS

    unet = diffusers.UNet2DModel(
        **BLOCKS, sample_size=16, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    )
    diffusers.DDPMPipeline(unet=unet.half(), scheduler=diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    pipeline = upcast.from_pretrained(diffusers.DDPMPipeline, tmp_path)
    assert [part.name for part in parts_of(pipeline)] == ["unet"]
    assert upcast.report(pipeline).startswith("unet: ")
    assert upcast.plan(pipeline).changes[0].name.startswith("unet.")
    assert upcast.unpatch(pipeline) is pipeline
    assert not half_weights(pipeline.unet)

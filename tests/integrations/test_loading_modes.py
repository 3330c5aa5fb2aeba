"""Loading changes nothing of what a program means: modes around it, arguments, heads, adapters, threads, and saving."""

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

transformers = pytest.importorskip("transformers")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


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

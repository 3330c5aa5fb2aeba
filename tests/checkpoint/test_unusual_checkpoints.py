"""Checkpoints that are legal and unusual: compressed, at odd addresses, lazily negated, expanded."""

import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upcast
from tests.conftest import address, half_weights, relative_error
from tests.integrations.test_loading import IDS, float32_model, logits, mapped, write, write_bin
from tests.litgpt_checkpoints import small_config, write_checkpoint
from upcast.integrations.litgpt.convert import convert

transformers = pytest.importorskip("transformers")
pytest.importorskip("litgpt")
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


# --- what may be done to a file ---------------------------------------------------------------------------------------


def repack(file: Path, compression: int) -> None:
    """Write the archive as other programs do: without torch's padding."""
    fresh = file.with_name("fresh")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(fresh, "w") as new:
        for entry in old.infolist():
            new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry), compression)
    fresh.replace(file)


def resave(file: Path, change: Callable[[Tensor], Tensor]) -> None:
    state = torch.load(file)
    torch.save({name: change(tensor) if tensor.is_floating_point() else tensor for name, tensor in state.items()}, file)


def part_of_a_conjugate(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.bfloat16:  # there are no complex numbers of it
        return torch._neg_view(-tensor)
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def end_like_an_archive(file: Path) -> None:
    """Write the format before torch 1.6, and near its end what an archive ends with, as numbers may by chance."""
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    with file.open("ab") as opened:
        opened.write(ENDS_ARCHIVES + bytes(40))


ENDS_ARCHIVES = b"PK\5\6"
FILES: dict[str, Callable[[Path], None]] = {
    "compressed": lambda file: repack(file, zipfile.ZIP_DEFLATED),
    "without padding": lambda file: repack(file, zipfile.ZIP_STORED),
    "old format": end_like_an_archive,
    "part of a conjugate": lambda file: resave(file, part_of_a_conjugate),
    "negated": lambda file: resave(file, lambda tensor: torch._neg_view(-tensor)),
}


def plain_litgpt(folder: Path) -> Tensor:
    """Return what LitGPT computes in float32 on the rounded weights."""
    from litgpt import GPT, Config

    model = GPT(Config.from_file(folder / "model_config.yaml"))
    state = torch.load(folder / "lit_model.pth")
    model.load_state_dict({name: t.half().float() if t.dim() >= 2 else t.float() for name, t in state.items()})
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


@torch.no_grad()
def ours_litgpt(folder: Path) -> Tensor:
    model = upcast.load_litgpt(folder)
    assert half_weights(model).keys() == {name for name, p in model.named_parameters() if p.dim() >= 2}
    return model(IDS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FILES)
def test_litgpt(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), dtype)
    want = plain_litgpt(folder)
    FILES[kind](folder / "lit_model.pth")
    assert relative_error(ours_litgpt(folder), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FILES)
def test_convert_makes_an_ordinary_file_of_it(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), dtype)
    want = plain_litgpt(folder)
    FILES[kind](folder / "lit_model.pth")
    assert "nothing to convert" not in convert(folder)
    twin = tmp_path / "checkpoint-float16"
    assert relative_error(ours_litgpt(twin), want) < 1e-5
    model = upcast.load_litgpt(twin)
    assert half_weights(model).keys() <= mapped(model, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FILES)
def test_bin(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = write_bin(tmp_path, dtype)
    want = logits(float32_model(folder))
    FILES[kind](folder / "pytorch_model.bin")
    model = upcast.from_pretrained(transformers.LlamaForCausalLM, folder)
    assert half_weights(model).keys() == {name for name, p in model.named_parameters() if p.dim() >= 2}
    assert relative_error(logits(model), want) < 1e-5


def without_padding(file: Path, odd: int) -> None:
    """Write a safetensors header of a length that puts every tensor ``odd`` bytes past a multiple of eight."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + size])).encode()
    header += b" " * ((odd - len(header)) % 8)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("odd", [1, 2, 4])
def test_safetensors_without_padding(tmp_path: Path, odd: int, dtype: torch.dtype) -> None:
    folder = write(tmp_path, dtype=dtype)
    want = logits(float32_model(folder))
    without_padding(folder / "model.safetensors", odd)
    model = upcast.from_pretrained(transformers.LlamaForCausalLM, folder)
    weights = half_weights(model)
    assert weights.keys() == {name for name, p in model.named_parameters() if p.dim() >= 2}
    assert relative_error(logits(model), want) < 1e-5
    held = weights.keys() & mapped(model, folder)
    assert held == (weights.keys() if dtype == torch.float16 and odd % 2 == 0 else set())  # only what is odd is copied


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)  # of bfloat16 they are beyond 65504
def test_safetensors_that_end_like_an_archive(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write(tmp_path, dtype=dtype)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-200, 2)
        file.write(ENDS_ARCHIVES)
    assert zipfile.is_zipfile(folder / "model.safetensors") or sys.version_info >= (3, 14)
    model = upcast.from_pretrained(transformers.LlamaForCausalLM, folder)
    assert relative_error(logits(model), logits(float32_model(folder))) < 1e-5


# --- tensors that are yet to be negated -------------------------------------------------------------------------------

W, X = torch.randn(33, 17), torch.randn(5, 17)


def negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


def conjugate(tensor: Tensor) -> Tensor:
    return part_of_a_conjugate(tensor.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [negated, conjugate])
def test_patch(make: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    weight = W.to(dtype).float() if make is conjugate else W.to(dtype)
    model = nn.Sequential(nn.Linear(17, 33), nn.Embedding(33, 17))
    model[0].weight, model[0].bias = nn.Parameter(make(weight)), nn.Parameter(make(W[:, 0]))
    model[1].weight = nn.Parameter(make(weight))
    model[1].register_buffer("buffer", make(W[0]))
    assert model[0].weight.is_neg()
    upcast.patch(model)
    assert half_weights(model).keys() == {"0.weight", "1.weight"}
    rounded = weight.half().float()
    with torch.no_grad():
        assert torch.allclose(model[0](X), F.linear(X, rounded, W[:, 0]), atol=1e-5)
        assert torch.equal(model[1](torch.tensor([3, 4])), rounded[3:5])
    assert torch.equal(model.state_dict()["0.weight"], weight.half())
    assert torch.equal(model[1].buffer, W[0])


def test_a_kept_weight_beside_an_equal_one_that_is_yet_to_be_negated() -> None:
    model = nn.Sequential(nn.Linear(17, 33, bias=False), nn.Linear(17, 33, bias=False))
    zeros = torch.zeros(33, 17)
    zeros[20, 9] = 1  # where the first look does not see it
    model[0].weight, model[1].weight = nn.Parameter(zeros.half()), nn.Parameter(torch._neg_view(zeros.half()))
    upcast.patch(model)
    assert model[0].weight[20, 9] == 1
    assert model[1].weight[20, 9] == -1


WRITES: dict[str, Callable[[nn.Linear, Tensor], Any]] = {
    "copy_": lambda layer, value: layer.weight.copy_(value),
    "data": lambda layer, value: setattr(layer.weight, "data", value),
    "load_state_dict": lambda layer, value: layer.load_state_dict({"weight": value, "bias": value[:, 0]}),
    "assign": lambda layer, value: layer.load_state_dict({"weight": value, "bias": value[:, 0]}, assign=True),
    "assign float16": lambda layer, value: layer.load_state_dict(
        {"weight": value.half(), "bias": value[:, 0]}, assign=True
    ),
    "assign neg float16": lambda layer, value: layer.load_state_dict(
        {"weight": negated(value.half()), "bias": value[:, 0]}, assign=True
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("write", WRITES)
def test_writes(write: str, mode: Any) -> None:
    layer = upcast.patch(nn.Linear(17, 33))
    with mode():
        WRITES[write](layer, negated(W.half().float()))
        assert torch.equal(layer.weight + 0, W.half().float())
        assert torch.allclose(layer(X), F.linear(X, W.half().float(), layer.bias + 0), atol=1e-5)
        assert torch.allclose(F.linear(X, layer.weight, layer.bias), layer(X), atol=1e-5)


# --- expanded tensors -------------------------------------------------------------------------------------------------


def expand(state: dict[str, Tensor]) -> None:
    for name in (EXPANDED, "transformer.h.0.norm_1.weight"):
        state[name] = state[name].flatten()[:1].clone().expand(state[name].shape)


EXPANDED = "transformer.h.1.mlp.fc.weight"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_weight_takes_no_more_memory_than_in_its_file(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), dtype, expand)
    folders = [folder]
    if dtype != torch.float16:
        convert(folder)
        folders.append(tmp_path / "checkpoint-float16")
    for each in folders:
        model = upcast.load_litgpt(each)
        weight = model.get_parameter(EXPANDED)
        assert half_weights(model).keys() == {name for name, p in model.named_parameters() if p.dim() >= 2} - {EXPANDED}
        assert weight.untyped_storage().nbytes() <= 64
        assert weight.stride() == (0, 0)
        state = torch.load(folder / "lit_model.pth")
        with torch.no_grad():
            want = plain_litgpt_with(folder, {EXPANDED: state[EXPANDED].float()})
            assert relative_error(model(IDS), want) < 1e-5
        torch.save(model.state_dict(), tmp_path / "saved.pth")
        shutil.copy(tmp_path / "saved.pth", each / "lit_model.pth")
        assert torch.equal(upcast.load_litgpt(each)(IDS), model(IDS))


def plain_litgpt_with(folder: Path, exact: dict[str, Tensor]) -> Tensor:
    from litgpt import GPT, Config

    model = GPT(Config.from_file(folder / "model_config.yaml"))
    state = torch.load(folder / "lit_model.pth")
    rounded = {name: t.half().float() if t.dim() >= 2 else t.float() for name, t in state.items()}
    model.load_state_dict({**rounded, **exact})
    return model(IDS)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixty_thousand_times_forty_thousand(tmp_path: Path, dtype: torch.dtype) -> None:
    """Neither patching nor reading takes memory for what is expanded: 4.8 GB each, if it did."""
    from upcast.checkpoint import reading
    from upcast.integrations.loading import Loading

    torch.save({"w": torch.full((1, 1), 1.5, dtype=dtype).expand(60_000, 40_000)}, tmp_path / "w.pth")
    state = reading.read(tmp_path / "w.pth")
    arrived = Loading().arrive("w", state["w"])
    known = reading.to_float16(state)
    model = nn.Module()
    model.w = nn.Parameter(state["w"], requires_grad=False)
    upcast.patch(model)
    assert not known
    for tensor in (arrived, model.w, model.state_dict()["w"]):
        assert tensor.dtype == torch.float32
        assert tensor.shape == (60_000, 40_000)
        assert tensor.untyped_storage().nbytes() <= 64
        assert tensor[59_999, 39_999] == 1.5
    assert "expanded" in str(upcast.report(model))


def test_rows_that_overlap_keep_their_layout() -> None:
    windows = torch.arange(20.0).half().as_strided((16, 5), (1, 1))
    layer = nn.Linear(5, 16, bias=False)
    layer.weight = nn.Parameter(windows)
    upcast.patch(layer)
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.stride() == (1, 1)
    assert layer.weight.untyped_storage().nbytes() == 4 * 20
    assert torch.equal(layer(torch.eye(5)), windows.float().t())


def test_the_address_of_an_ordinary_weight_is_the_file_s(tmp_path: Path) -> None:
    """What is unusual is copied alone."""
    folder = write_checkpoint(tmp_path / "checkpoint", small_config("pythia-160m"), torch.float16)
    resave_one = torch.load(folder / "lit_model.pth")
    resave_one[EXPANDED] = negated(resave_one[EXPANDED])
    torch.save(resave_one, folder / "lit_model.pth")
    model = upcast.load_litgpt(folder)
    assert half_weights(model).keys() - mapped(model, folder) == {EXPANDED}
    assert address(model.lm_head.weight)

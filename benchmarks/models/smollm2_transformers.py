"""SmolLM2-135M-Instruct as a Transformers checkpoint folder, made out of the LitGPT one.

``python -m benchmarks.models.smollm2_transformers`` prints where it is.
"""

import json
from pathlib import Path

from benchmarks.models.smollm2 import MANIFEST, prepare
from benchmarks.models.transformers_checkpoint import write_transformers


def prepare_transformers(folder: Path | None = None) -> Path:
    """Return a folder for ``AutoModelForCausalLM.from_pretrained``, written beside LitGPT's on first use (float16)."""
    source = prepare()
    folder = folder or source.with_name(f"{source.name}-transformers")
    made_of = json.loads((source / MANIFEST).read_text())["files"]["lit_model.pth"]["sha256"]
    note = folder / "made_of.txt"
    if (folder / "config.json").is_file() and note.is_file() and note.read_text() == made_of:
        return folder
    write_transformers(source, folder)
    note.write_text(made_of)  # last: it says that all is there
    return folder


if __name__ == "__main__":
    print(prepare_transformers())

"""One rank of the tests of distributed models: loads each checkpoint, computes, and writes down what it got.

usage: distributed_worker.py OUTPUT_FOLDER WIRE CHECKPOINT_FOLDER...
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

import upcast
from tests.conftest import half_weights
from tests.fused_models import calls
from upcast.distributed import join, leave
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.packed_weight import PackedWeight

PROMPT, NEW = 9, 12


def weight_bytes(model: torch.nn.Module) -> int:
    weights = [w.store.bytes if isinstance(w, PackedWeight) else w.stored for w in half_weights(model).values()]
    seen = {numbers.data_ptr(): numbers.nbytes for numbers in weights if numbers is not None}
    return sum(seen.values()) + sum(p.nbytes for p in model.parameters() if not isinstance(p, HalfWeight))


def results(model: Any) -> dict[str, Any]:
    """Logits of a whole text, of one decoded from a cache, and LitGPT's own greedy generation."""
    from litgpt.generate.base import generate

    size = model.config.vocab_size
    ids = torch.randint(1, size, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    whole = model(ids)
    model.set_kv_cache(2, PROMPT + NEW)
    steps = [model(ids[:, :5], torch.arange(5))]
    steps += [model(ids[:, i : i + 1], torch.tensor([i]), input_pos_maxp1=i + 1) for i in range(5, PROMPT)]
    model.clear_kv_cache()
    model.set_kv_cache(1, PROMPT + NEW)
    text = generate(model, ids[0], PROMPT + NEW, temperature=0.0, eos_id=None)
    floats = [name for name, p in model.named_parameters() if p.dim() > 1 and not isinstance(p, HalfWeight)]
    model.clear_kv_cache()
    return {
        "whole": whole.clone(),
        "steps": torch.cat(steps, 1).clone(),
        "text": text.clone(),
        "copy": copy.deepcopy(model)(ids).clone(),
        "bytes": weight_bytes(model),
        "fused": calls(model),
        "blocks": model.forward.calls,  # of the model with one native call for each block or half of it
        "float32": floats,
        "packed": sum(isinstance(p, PackedWeight) for p in model.parameters()),
    }


def load(folder: Path, **options: Any) -> Any:
    storage = "packed" if folder.name == "packing" else None
    return upcast.load_litgpt(folder, kv_cache="float32", storage=storage, **options)


def main(output: Path, wire: str, folders: list[Path]) -> None:
    mesh = join(timeout=120)
    with torch.inference_mode():
        for folder in folders:
            model = load(folder, mesh=mesh, wire=wire)
            group = model.parallel_group
            found = results(model)
            found.update(calls=group.calls, repeated=group.repeated)
            torch.save(found, output / f"{folder.name}-{mesh.get_rank()}.pt")
    leave(mesh)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [Path(name) for name in sys.argv[3:]])

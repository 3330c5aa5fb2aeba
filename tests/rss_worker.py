"""One rank of the tests of memory: loads one model, and prints by how much its peak grew, and its weights, in bytes.

usage: rss_worker.py DOOR SMALL_FOLDER FOLDER; DOOR: litgpt, UPCAST=1 (which the environment opens), from_pretrained
"""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import upcast
from benchmarks.harness import memory
from tests.distributed_worker import weight_bytes
from upcast.distributed import join, leave
from upcast.tensor.half_weight import HalfWeight


def load(door: str, folder: Path) -> Any:
    if door == "litgpt":
        return upcast.load_litgpt(folder, mesh=mesh)
    if door == "UPCAST=1":
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    return upcast.from_pretrained(AutoModelForCausalLM, folder, tp_plan="auto")


door, small, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
mesh = join(timeout=120)
load(door, small)  # what is imported and made once would count
memory.reset_peak()
before = memory.peak_bytes()
model = load(door, folder)
grown = memory.peak_bytes() - before
halves = sum(isinstance(p, HalfWeight) for p in model.parameters())
wide = sum(p.numel() for p in model.parameters() if p.dim() > 1 and not isinstance(p, HalfWeight))
print(json.dumps({"grown": grown, "held": weight_bytes(model), "halves": halves, "wide": wide}), flush=True)
leave(mesh)

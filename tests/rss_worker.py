"""One rank of the tests of memory: loads one model, and prints by how much its peak grew, and its weights, in bytes.

usage: rss_worker.py DOOR FOLDER, where DOOR is litgpt, UPCAST=1 (which the environment opens) or from_pretrained
"""

import json
import sys
from pathlib import Path

import litgpt.model  # noqa: F401 (what is imported while loading would count)
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama  # noqa: F401

import upcast
from benchmarks import memory
from tests.distributed_worker import weight_bytes
from upcast.distributed import join, leave
from upcast.half_weight import HalfWeight

door, folder = sys.argv[1], Path(sys.argv[2])
mesh = join(timeout=120)
torch.nn.functional.linear(torch.ones(1, 8), torch.ones(8, 8))
memory.reset_peak()
before = memory.peak_bytes()
if door == "litgpt":
    model = upcast.load_litgpt(folder, mesh=mesh)
elif door == "UPCAST=1":
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
else:
    model = upcast.from_pretrained(AutoModelForCausalLM, folder, tp_plan="auto")
grown = memory.peak_bytes() - before
halves = sum(isinstance(p, HalfWeight) for p in model.parameters())
wide = sum(p.numel() for p in model.parameters() if p.dim() > 1 and not isinstance(p, HalfWeight))
print(json.dumps({"grown": grown, "held": weight_bytes(model), "halves": halves, "wide": wide}), flush=True)
leave(mesh)

"""One rank of the test of Transformers' tensor-parallel models.

usage: transformers_worker.py OUTPUT_FOLDER MODEL_FOLDER...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import upcast
from tests.conftest import half_weights

output, folders = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    if os.environ.get("UPCAST") != "1":
        upcast.patch(model)
    ids = torch.arange(1, 25).reshape(2, 12)
    with torch.inference_mode():
        logits = model(ids).logits
        text = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    found = {
        "logits": logits,
        "text": text,
        "bytes": {name: weight.stored.nbytes for name, weight in half_weights(model).items()},
        "float32": [name for name, p in model.named_parameters() if p.dim() > 1 and name not in half_weights(model)],
        "report": upcast.report(model),
    }
    torch.save(found, output / f"{folder.name}-{dist.get_rank()}.pt")
dist.destroy_process_group()

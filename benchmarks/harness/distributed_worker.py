"""One rank of the distributed suite: decodes, and prints its figures as one line of JSON.

usage: python -m benchmarks.harness.distributed_worker CHECKPOINT_FOLDER TOKENS TIMEOUT WIRE
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

import upcast
from upcast.distributed import Group, join, leave
from upcast.tensor.half_weight import HalfWeight

PROMPT, COMPARED = 16, 2000  # tokens of the prompt; logits to compare


def main(folder: Path, tokens: int, timeout: float, wire: str) -> None:
    mesh = join(timeout)
    if hasattr(os, "sched_setaffinity"):  # each rank keeps a processor, or two may begin on the same one
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[mesh.get_rank() % len(processors)]})
    alone = mesh.size() == 1
    model = upcast.load_litgpt(folder, mesh=None if alone else mesh, wire=wire)  # alone: whole blocks in one call
    group = Group(mesh.get_group()) if alone else model.parallel_group
    with torch.inference_mode():
        model.set_kv_cache(1, PROMPT + tokens + 1)
        logits = model(torch.arange(1, PROMPT + 1)[None], torch.arange(PROMPT))[:, -1:]
        first, token = logits[0, 0, :COMPARED].tolist(), logits.argmax(-1)
        group.calls, group.seconds = 0, 0.0
        samples, between = [], []  # of each token: seconds, and those of them in collectives
        for position in range(PROMPT, PROMPT + tokens):
            start, before = time.perf_counter(), group.seconds
            logits = model(token, torch.tensor([position]), input_pos_maxp1=position + 1)
            samples.append(time.perf_counter() - start)
            between.append(group.seconds - before)
            token = logits.argmax(-1)
    weights = {w.stored.data_ptr(): w.stored.nbytes for w in model.parameters() if isinstance(w, HalfWeight)}
    found = {"samples": samples, "calls": group.calls, "collective_samples": between, "logits": first}
    print(json.dumps({**found, "rank": group.rank, "weight_bytes": sum(weights.values())}), flush=True)
    leave(mesh)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])

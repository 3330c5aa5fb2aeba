"""One rank of the tests of shared memory: the same numbers through it and through gloo.

usage: shared_worker.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch

from upcast.distributed import Group, join, leave
from upcast.distributed.shared_memory import SEGMENT

SIZES = (1, 768, SEGMENT // 4, SEGMENT // 2 + 3, SEGMENT + 5)

mesh = join(timeout=120)
ours, gloo = Group(mesh.get_group()), Group(mesh.get_group())
ours.share()
assert ours.shared is not None, "the ranks of one host share memory"
random = torch.Generator().manual_seed(ours.rank)
inputs = [torch.randn(size, generator=random) for size in SIZES for _ in range(5)]
sums = [(ours.sum(x.clone()), gloo.sum(x.clone())) for x in inputs]
uneven = [SIZES[1] + rank for rank in range(ours.size)]
parts = [
    torch.randn(2, uneven[ours.rank], generator=random),
    torch.randn(2, uneven[ours.rank], generator=random).half(),
]
gathered = [(ours.concatenate(x, uneven), gloo.concatenate(x, uneven)) for x in parts]
gathered += [(ours._gathered(x), gloo._gathered(x)) for x in inputs]
gloo.sum(torch.zeros(1))
if ours.rank == ours.size - 1:
    ours.shared.close()
missed = ""
try:
    ours.shared.sum(torch.zeros(3))
except RuntimeError as error:
    missed = str(error)
found = {"sums": sums, "gathered": gathered, "sizes": SIZES, "missed": missed}
torch.save(found, Path(sys.argv[1]) / f"{ours.rank}.pt")
leave(mesh)

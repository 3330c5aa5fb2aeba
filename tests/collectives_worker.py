"""One rank of test_collectives.py: runs each operation on an unpatched and on a patched model, and prints how far apart
the results are.

usage: collectives_worker.py RANK RANKS STORE_FILE
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import upcast
from tests.conftest import rounded

X = torch.ones(2, 5)


def net(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5)).eval()


def broadcast(model: nn.Module) -> Tensor:
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return model(X)


def broadcast_of_parameters(model: nn.Module) -> Tensor:
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 1)
    return model(X)


def all_reduce(model: nn.Module) -> Tensor:
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
    return model(X)


def all_reduce_later(model: nn.Module) -> Tensor:
    works = [dist.all_reduce(parameter.data, async_op=True) for parameter in model.parameters()]
    for work in works:
        work.wait()
    return model(X)


def all_gather(model: nn.Module) -> Tensor:
    parts = [torch.empty(4, 5) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, model[0].weight.detach())
    return torch.stack(parts)


def scatter(model: nn.Module) -> Tensor:
    parts = [model[1].weight.detach().t().contiguous() * (i + 1) for i in range(2)] if dist.get_rank() == 0 else None
    dist.scatter(model[0].weight.data, parts, 0)
    return model(X)


def send_and_receive(model: nn.Module) -> Tensor:
    if dist.get_rank() == 0:
        dist.send(model[0].weight.detach(), 1)
    else:
        dist.recv(model[0].weight.data, 0)
    return model(X)


def exchange(model: nn.Module) -> Tensor:
    other = 1 - dist.get_rank()
    works = [dist.irecv(model[0].weight.data, other), dist.isend(model[1].weight.detach().t().contiguous(), other)]
    for work in works:
        work.wait()
    return model(X)


def objects(model: nn.Module) -> Tensor:
    held = [model[0].weight.detach()]
    dist.broadcast_object_list(held, 0)
    return held[0]


def averaged_model(model: nn.Module) -> Tensor:
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)
        parameter.data /= dist.get_world_size()
    return model(X)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        model(X * (dist.get_rank() + 1)).square().sum().backward()
        optimizer.step()


def data_parallel(model: nn.Module) -> Tensor:
    parallel = DistributedDataParallel(model)
    _steps(parallel, torch.optim.SGD(parallel.parameters(), lr=0.01))
    return model(X)


def data_parallel_with_an_optimizer_from_before(model: nn.Module) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    _steps(DistributedDataParallel(model), optimizer)
    return model(X)


def data_parallel_head(model: nn.Module) -> Tensor:
    model[0].requires_grad_(False)
    parallel = DistributedDataParallel(model)
    _steps(parallel, torch.optim.SGD(parallel.parameters(), lr=0.01))
    return model(X)


PROGRAMS: list[Callable[[nn.Module], Tensor]] = [
    *(
        broadcast,
        broadcast_of_parameters,
        all_reduce,
        all_reduce_later,
        all_gather,
        scatter,
        send_and_receive,
        exchange,
    ),
    *(objects, averaged_model, data_parallel, data_parallel_with_an_optimizer_from_before, data_parallel_head),
]


def difference(program: Callable[[nn.Module], Tensor], rank: int) -> Any:
    want = program(rounded(net(rank))).detach()
    got = program(upcast.patch(net(rank))).detach()
    return float((got - want).abs().max())


if __name__ == "__main__":
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")  # gloo's own
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    print(json.dumps({program.__name__: difference(program, rank) for program in PROGRAMS}))
    dist.barrier()  # no rank leaves another one's messages behind
    dist.destroy_process_group()
    # Torch's threads of the group outlive this wherever DistributedDataParallel was given it, patched or not. One that
    # lets go of a tensor of Python's while the interpreter ends aborts the process (pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)

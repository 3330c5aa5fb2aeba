"""Several processes, on one machine or more, that compute one model together on torch.distributed (gloo)."""

from upcast.distributed.collectives import Group, RankError
from upcast.distributed.rendezvous import join, joined, leave

__all__ = ["Group", "RankError", "join", "joined", "leave"]

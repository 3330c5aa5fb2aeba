"""Several processes, on one machine or more, that compute one model together on torch.distributed (gloo)."""

from upcast.distributed.group import Group, RankError
from upcast.distributed.joining import join, joined, leave

__all__ = ["Group", "RankError", "join", "joined", "leave"]

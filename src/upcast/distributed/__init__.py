"""Several processes, on one machine or more, that compute one model together on torch.distributed (gloo)."""

from upcast.distributed.group import Group
from upcast.distributed.joining import join, leave

__all__ = ["Group", "join", "leave"]

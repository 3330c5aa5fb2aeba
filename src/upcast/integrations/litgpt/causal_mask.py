"""LitGPT's mask cache without its memory: the rows of a causal mask are made where they are looked at.

LitGPT keeps a (1, 1, S, S) boolean mask beside its KV cache: 1 GB at 32768 positions. The fused forwards know that the
mask is causal; LitGPT's own forward selects the rows of its new positions.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from upcast.integrations.litgpt.modules import LitGPTForward
from upcast.integrations.litgpt.prefix_cache import caches_of, drop, held_of, kept
from upcast.tensor.genuine import Root


class CausalMask(Tensor):
    """A boolean tensor (1, 1, S, S), true where the last index is at most the one before, that has no memory.

    ``index_select`` of rows makes those rows. At any other operation it becomes an ordinary mask, and stays one: its
    caller may be about to write into it.
    """

    length: int
    made: Tensor | None

    @staticmethod
    def __new__(cls, length: int, made: Tensor | None = None) -> "CausalMask":
        self: CausalMask = Tensor._make_wrapper_subclass(cls, (1, 1, length, length), dtype=torch.bool)
        self.length, self.made = length, made
        return self

    @property
    def imagined(self) -> bool:
        """Whether it still is causal for sure, and takes no memory."""
        return self.made is None

    def rows(self, positions: Tensor) -> Tensor:
        """Return (1, 1, T, S) for positions (T,); IndexError, as from any index_select, if one is outside."""
        last = torch.arange(self.length)
        return (last <= last.index_select(0, positions).unsqueeze(1))[None, None]

    def whole(self) -> Tensor:
        """Return the mask as an ordinary tensor, the same one each time."""
        if self.made is None:
            self.made = self.rows(torch.arange(self.length))
        return self.made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        selects = func is torch.ops.aten.index_select.default and args[1] == 2
        if selects and isinstance(first, CausalMask) and first.imagined:
            return first.rows(args[2])
        args, kwargs = pytree.tree_map_only(CausalMask, CausalMask.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CausalMask":
        return CausalMask(self.length, copy.deepcopy(self.made, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (CausalMask, (self.length, self.made))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CausalMask({self.length} x {self.length})"


class CacheSetter(LitGPTForward):
    """``set_kv_cache`` of one GPT: LitGPT's own, but it finds a mask of the right size, and kept caches go on."""

    method = "set_kv_cache"

    def stands_for(self, module: Any) -> tuple[Any, ...]:
        """The mask is not made by LitGPT."""
        return _roots, type(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drop(self.module)
        return self.fused(*args, **kwargs) if self.genuine() else self.unfused(*args, **kwargs)

    def fused(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the caches, as ``GPT.set_kv_cache`` does; those that are kept hand over what they hold."""
        gpt, size = self.module, max_seq_length
        size = gpt.max_seq_length if size is None else size
        on_cpu = device is None or torch.device(device).type == "cpu"
        before = gpt.mask_cache
        if on_cpu and size > 0 and (before is None or before.size(3) != size):
            gpt.mask_cache = CausalMask(size)
        try:
            type(gpt).set_kv_cache(gpt, batch_size, max_seq_length, rope_cache_length, device, dtype)
        except BaseException:
            gpt.mask_cache = before
            raise
        held = held_of(gpt)
        if held is not None and kept(gpt):
            held.take_over(caches_of(gpt))


def _roots(gpt: type) -> list[Root]:
    return [(gpt, "set_kv_cache")]


def restore(gpt: nn.Module) -> None:
    """Give ``gpt`` an ordinary mask in place of one without memory."""
    mask: Any = gpt.__dict__.get("mask_cache")
    if isinstance(mask, CausalMask):
        gpt.__dict__["mask_cache"] = mask.whole()

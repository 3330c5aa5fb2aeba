"""One block of LitGPT as the native call takes it, where it is one that the call knows."""

from typing import Any

from torch import Tensor, nn

from upcast.integrations.fused import float32, fuses
from upcast.integrations.litgpt.divided_block import DividedBlock
from upcast.integrations.litgpt.modules import (
    SCORES,
    FusedAttention,
    FusedGatedMLP,
    FusedLayerNorm,
    FusedRMSNorm,
    plain_cache,
)
from upcast.integrations.litgpt.positions import positions
from upcast.kernels import native
from upcast.patching.fast_linear import LinearForward, operands
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT

_NO_NORM = (None, None, 0, 0.0, 0.0)
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}

Angles = tuple[Tensor, Tensor]  # cos and sin, each (T, n)


class Step:
    """One block for the native kernel: where its cache is, and the arguments that stay the same from call to call."""

    def __init__(self, attn: Any, cache: Any, rope: int | None, sizes: tuple[Any, ...], rest: tuple[Any, ...]) -> None:
        self.attn, self.rope, self.sizes, self.rest = attn, rope, sizes, rest
        self.ring = bool(attn.apply_sliding_window_attention)
        self.capped = attn.config.attention_logit_softcapping is not None
        self.cache = cache
        self.batch: int = 0 if cache is None else cache.k.shape[0]
        self.size: int = 0 if cache is None else cache.k.shape[2]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides where its cache takes a position, and with which angles."""
        return (self.batch, self.size, self.ring, self.capped, self.rope)

    def place(self, start: int, batch: int, time: int, maxp1: int | None) -> tuple[int, int] | None:
        """Return (start for the mask, where to write), or None where the cache does not take these positions."""
        if batch > self.batch:
            return None
        return positions(self.size, self.ring, self.capped, start, time, maxp1)

    def run(self, x: Tensor, angles: Angles, place: tuple[int, int] | None, last: int | None = None) -> Any:
        """Return the block's output for x (B, T, C), upcasting its cache if keys or values ask for it.

        With ``last``, of so many last positions at least.
        """
        return self._call(native.WHOLE, x, angles, place, last)

    def _call(
        self, part: int, x: Tensor, angles: Angles, place: tuple[int, int] | None, last: int | None = None
    ) -> Any:
        if place is None:
            return native.block(x, *angles, None, None, (part, *self.sizes, 0, 0, *self.rest), last)
        arguments = (part, *self.sizes, *place, *self.rest)
        y = native.block(x, *angles, *self._cache(x), arguments, last)
        if y is None:
            self.upcast()
            y = native.block(x, *angles, *self._cache(x), arguments, last)
        return y

    def upcast(self) -> None:
        """Keep this block's keys and values in float32 from now on."""
        self.attn.build_kv_cache.upcast(self.cache)

    def arguments(self, place: int) -> tuple[Any, ...]:
        """Return this block as `native.blocks` takes it, over its whole cache."""
        buffers = self.cache._buffers
        return (place, buffers["k"], buffers["v"], native.WHOLE, *self.sizes, *self.rest)

    def _cache(self, x: Tensor) -> tuple[Tensor, Tensor]:
        buffers = self.cache._buffers
        k, v = buffers["k"], buffers["v"]
        return (k, v) if x.shape[0] == self.batch else (k[: x.shape[0]], v[: x.shape[0]])


class DividedStep(Step):
    """A block of which this rank has a part: a call for each half, or for both where one sum serves both."""

    def __init__(self, divided: DividedBlock, *args: Any) -> None:
        super().__init__(*args)
        self.divided = divided

    def run(self, x: Tensor, angles: Angles, place: tuple[int, int] | None, last: int | None = None) -> Any:
        """Return the block's output for x (B, T, C), as all ranks have it; of all positions."""
        divided = self.divided
        if divided.together:
            return divided.group.sum(self._call(native.BOTH, x, angles, place)).add_(x)
        attended = divided.after_attention(self._call(native.ATTENTION, x, angles, place), x)
        read = x if divided.module.config.parallel_residual else attended
        return divided.after_mlp(self._call(native.MLP, read, angles, None), attended)


def step_of(block: Any, index: int) -> Step | None:
    """Return the native call for ``block``, or None if it needs what the kernel does not know."""
    attn, config = block.attn, block.attn.config  # of a divided block, with the heads that are here
    forward, divided = attn.__dict__.get("forward"), _divided(block)
    if not (_is_block(block) or divided) or not fuses(attn, FusedAttention) or config.rope_interleave:
        return None
    if SCORES in attn.__dict__:
        return None
    if attn.kv_cache is not None and not plain_cache(attn.kv_cache, config):
        return None
    mlp = _mlp(block.mlp)
    matrices = [_matrix(each) for each in (attn.qkv, None, None, attn.proj, *mlp[1:])] if mlp else [None]
    norms = [_norm(each) for each in (block.norm_1, None if config.shared_attention_norm else block.norm_2)]
    # of a divided block these follow the ranks' sum
    norms += [_norm(None if divided else each) for each in (block.post_attention_norm, block.post_mlp_norm)]
    norms += [_norm(each) for each in (attn.norm_q, attn.norm_k)]
    if mlp is None or None in matrices or None in norms:
        return None
    window = config.sliding_window_size if attn.apply_sliding_window_attention else 0
    sizes = (config.n_head, config.n_query_groups, config.head_size, config.norm_qk_type == "default")
    kinds = (config.parallel_residual, config.shared_attention_norm, native.ACTIVATIONS[mlp[0]])
    scores = (forward.scale(), config.attention_logit_softcapping or 0.0, window)
    rest = tuple(item for group in (*matrices, *norms, (KEY_LIMIT, VALUE_LIMIT)) if group for item in group)
    rope = None if config.rope_indices is None else config.rope_indices[index]
    step = (attn, attn.kv_cache, rope, (*sizes, *kinds, *scores), rest)
    return DividedStep(divided, *step) if divided else Step(*step)


def _divided(block: Any) -> DividedBlock | None:
    forward = block.__dict__.get("forward")
    return forward if isinstance(forward, DividedBlock) else None


def _is_block(block: nn.Module) -> bool:
    """Whether ``block`` runs the forward of LitGPT's Block, as subclasses with other layers do."""
    from litgpt.model import Block

    return isinstance(block, Block) and type(block).forward is Block.forward and "forward" not in block.__dict__


def _plain(module: nn.Module) -> bool:
    """Whether ``module`` runs its class's forward, or a short way to the same."""
    return isinstance(module.__dict__.get("forward"), (LinearForward, type(None)))


def _matrix(linear: Any) -> tuple[Any, Any] | None:
    """Return (float16 weight, bias) of a plain patched Linear; (None, None) where there is none."""
    if linear is None:
        return (None, None)
    if type(linear) is not nn.Linear or not _plain(linear):
        return None
    return operands(linear)


def _norm(norm: Any) -> tuple[Any, ...] | None:
    """Return (weight, bias, kind, eps, offset) of a norm as the kernel takes it."""
    if norm is None or (type(norm) is nn.Identity and _plain(norm)):
        return _NO_NORM
    if fuses(norm, FusedRMSNorm) and float32(norm.weight):
        return (norm.weight, None, 1, norm.eps, float(norm.add_unit_offset))
    if fuses(norm, FusedLayerNorm) and all(each is None or float32(each) for each in (norm.weight, norm.bias)):
        return (norm.weight, norm.bias, 2, norm.eps, 0.0)
    return None


def _mlp(mlp: Any) -> tuple[Any, ...] | None:
    """Return (activation, gate, up or None, down) of an MLP that the kernel knows."""
    from litgpt.model import GptNeoxMLP

    if fuses(mlp, FusedGatedMLP):
        return (mlp.__dict__["forward"].activation, mlp.fc_1, mlp.fc_2, mlp.proj)
    if type(mlp) is GptNeoxMLP and _plain(mlp):
        return (_GELU[mlp.config.gelu_approximate], mlp.fc, None, mlp.proj)
    return None

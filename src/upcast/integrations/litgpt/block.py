"""One block of LitGPT as the native call takes it, where it is one that the call knows."""

from typing import Any

from torch import Tensor, nn

from upcast.integrations.fused import UnknownLayer, float32, fuses, matrix, plain, rms_norm
from upcast.integrations.litgpt.divided_block import DividedBlock
from upcast.integrations.litgpt.modules import (
    SCORES,
    FusedAttention,
    FusedGatedMLP,
    FusedLayerNorm,
    FusedRMSNorm,
    plain_cache,
)
from upcast.integrations.litgpt.moe import FusedMoE
from upcast.integrations.litgpt.positions import positions
from upcast.integrations.litgpt.versions import grouped, setting
from upcast.kernels import native
from upcast.kernels.block_spec import ACTIVATIONS, NORMS, PARTS, BlockSpec, Matrix, Norm
from upcast.tensor.attention_ops import KEY_LIMIT, VALUE_LIMIT

_GELU = {"none": "gelu", "tanh": "gelu_tanh"}

WHOLE, ATTENTION, MLP, BOTH = PARTS.values()
Angles = tuple[Tensor, Tensor]  # cos and sin, each (T, n)


class Step:
    """One block for the native kernel: where its cache is, and what it is made of."""

    def __init__(self, attn: Any, cache: Any, rope: int | None, spec: BlockSpec) -> None:
        self.attn, self.rope, self.spec = attn, rope, spec
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
        return self._call(WHOLE, x, angles, place, last)

    def _call(
        self, part: int, x: Tensor, angles: Angles, place: tuple[int, int] | None, last: int | None = None
    ) -> Any:
        if place is None:
            return native.block(x, *angles, None, None, self.spec, (0, 0), part, last)
        y = native.block(x, *angles, *self._cache(x), self.spec, place, part, last)
        if y is None:
            self.upcast()
            y = native.block(x, *angles, *self._cache(x), self.spec, place, part, last)
        return y

    def upcast(self) -> None:
        """Keep this block's keys and values in float32 from now on."""
        self.attn.build_kv_cache.upcast(self.cache)

    def arguments(self, place: int) -> tuple[Any, ...]:
        """Return this block as `native.blocks` takes it, over its whole cache."""
        buffers = self.cache._buffers
        return (place, buffers["k"], buffers["v"], self.spec)

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
            return divided.group.sum(self._call(BOTH, x, angles, place)).add_(x)
        attended = divided.after_attention(self._call(ATTENTION, x, angles, place), x)
        read = x if divided.module.config.parallel_residual else attended
        return divided.after_mlp(self._call(MLP, read, angles, None), attended)


class MixtureStep(Step):
    """A block whose MLP is a mixture of experts: a call for attention, one for the router, and one for the experts."""

    def __init__(self, block: Any, divided: DividedBlock | None, *args: Any) -> None:
        super().__init__(*args)
        self.block, self.divided = block, divided
        self.mixture: FusedMoE = block.mlp.__dict__["forward"]
        self.norm, self.gate = _router(block, divided is not None)
        self.post = None if type(block.post_attention_norm) is nn.Identity else block.post_attention_norm

    def run(self, x: Tensor, angles: Angles, place: tuple[int, int] | None, last: int | None = None) -> Any:
        """Return the block's output for x (B, T, C); with ``last``, of so many last positions."""
        block, branch = self.block, self._call(ATTENTION, x, angles, place)
        if self.divided:
            attended = self.divided.after_attention(branch, x)
        else:
            attended = branch.add_(x) if self.post is None else self.post(branch) + x
        if last is not None:
            attended = attended[:, -last:]
        if self.gate is not None and self.mixture.complete():
            return self.mixture.after(attended, self.norm, self.gate)
        branch = block.mlp(block.norm_2(attended))
        return self.divided.after_mlp(branch, attended) if self.divided else block.post_mlp_norm(branch) + attended


def _router(block: Any, divided: bool) -> tuple[Norm, Matrix | None]:
    """Return the norm and the gate before the experts, where nothing but the residual follows them."""
    alone = not divided and type(block.post_mlp_norm) is nn.Identity
    return _norm(block.norm_2), block.mlp.__dict__["forward"].simple_gate() if alone else None


def called(block: Any) -> list[nn.Module]:
    """Return the modules of ``block`` that are called as modules, or of which the mixture tells who watches them."""
    if not _is_mixture(block.mlp):
        return []
    gate = block.mlp.gate if type(block.mlp.gate) is nn.Linear else None
    return [module for module in block.mlp.modules() if module not in (block.mlp, gate)]


def step_of(block: Any, index: int) -> Step | None:
    """Return the native call for ``block``, or None if it needs what the kernel does not know."""
    attn, config = block.attn, block.attn.config  # of a divided block, with the heads that are here
    forward, divided = attn.__dict__.get("forward"), _divided(block)
    if not (_is_block(block) or divided) or not fuses(attn, FusedAttention):
        return None
    if SCORES in attn.__dict__ or setting(config, "rope_interleave") or grouped(attn):
        return None
    if attn.kv_cache is not None and not plain_cache(attn.kv_cache, forward.cache_heads(), config.head_size):
        return None
    try:
        spec = _spec(block, divided is not None, forward.scale())
    except UnknownLayer:
        return None
    indices = setting(config, "rope_indices")
    rope = None if indices is None else indices[index]
    step = (attn, attn.kv_cache, rope, spec)
    if _is_mixture(block.mlp):
        return MixtureStep(block, divided, *step)
    return DividedStep(divided, *step) if divided else Step(*step)


def _is_mixture(mlp: nn.Module) -> bool:
    return fuses(mlp, FusedMoE)


def _spec(block: Any, divided: bool, scale: float) -> BlockSpec:
    """Return what ``block`` is made of; of a mixture, what comes before the experts."""
    attn, config = block.attn, block.attn.config
    mixture = _is_mixture(block.mlp)
    if mixture and config.parallel_residual:
        raise UnknownLayer
    activation, gate, up, down = ("silu", None, None, None) if mixture else _mlp(block.mlp)
    apart = divided or mixture  # then the norms behind the branches are called as modules
    return BlockSpec(
        heads=config.n_head,
        groups=config.n_query_groups,
        head_width=config.head_size,
        norm_heads=setting(config, "norm_qk_type") == "default",
        parallel=config.parallel_residual,
        shared=config.shared_attention_norm,
        activation=ACTIVATIONS[activation],
        scale=scale,
        softcap=config.attention_logit_softcapping or 0.0,
        window=config.sliding_window_size if attn.apply_sliding_window_attention else 0,
        qkv=matrix(attn.qkv),
        key=Matrix(),
        value=Matrix(),
        proj=matrix(attn.proj),
        gate=matrix(gate),
        up=matrix(up),
        down=matrix(down),
        norm_1=_norm(block.norm_1),
        norm_2=_norm(None if config.shared_attention_norm else block.norm_2),
        # of a divided block these follow the ranks' sum
        post_attention=_norm(None if apart else block.post_attention_norm),
        post_mlp=_norm(None if apart else block.post_mlp_norm),
        norm_q=_norm(attn.norm_q),
        norm_k=_norm(attn.norm_k),
        key_limit=KEY_LIMIT,
        value_limit=VALUE_LIMIT,
    )


def finish_of(norm: Any, head: Any) -> tuple[Norm, Matrix] | None:
    """Return the norm and the head after the blocks as `native.blocks` takes them, or None if it does not."""
    try:
        return _norm(norm), matrix(head)
    except UnknownLayer:
        return None


def _divided(block: Any) -> DividedBlock | None:
    forward = block.__dict__.get("forward")
    return forward if isinstance(forward, DividedBlock) else None


def _is_block(block: nn.Module) -> bool:
    """Whether ``block`` runs the forward of LitGPT's Block, as subclasses with other layers do."""
    from litgpt.model import Block

    return isinstance(block, Block) and type(block).forward is Block.forward and "forward" not in block.__dict__


def _norm(norm: Any) -> Norm:
    """Return a norm as the kernel takes it."""
    if norm is None or (type(norm) is nn.Identity and plain(norm)):
        return Norm()
    if fuses(norm, FusedRMSNorm):
        return rms_norm(norm, FusedRMSNorm, "eps", float(norm.add_unit_offset))
    if fuses(norm, FusedLayerNorm) and all(each is None or float32(each) for each in (norm.weight, norm.bias)):
        return Norm(norm.weight, norm.bias, NORMS["layer"], norm.eps)
    raise UnknownLayer


def _mlp(mlp: Any) -> tuple[str, Any, Any, Any]:
    """Return (activation, gate, up or None, down) of an MLP that the kernel knows."""
    from litgpt.model import GptNeoxMLP

    if fuses(mlp, FusedGatedMLP):
        return (mlp.__dict__["forward"].activation, mlp.fc_1, mlp.fc_2, mlp.proj)
    if type(mlp) is GptNeoxMLP and plain(mlp):
        return (_GELU[mlp.config.gelu_approximate], mlp.fc, None, mlp.proj)
    raise UnknownLayer

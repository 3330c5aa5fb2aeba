"""LitGPT's GPT with one native call per block, or for all of them, and only the logits that LitGPT reads.

The fused forward of the whole model runs when every block is one that the native kernels know and nobody watches a
module inside it. Otherwise LitGPT's own `GPT.forward` runs, over the module-level forwards of `modules`.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from upcast import kernels
from upcast.core import scopes
from upcast.core.errors import KernelError
from upcast.core.forward_override import Forward
from upcast.integrations.fused import hooked, unwatched_call
from upcast.integrations.litgpt.block import Angles, MixtureStep, Step, called, finish_of, step_of
from upcast.integrations.litgpt.causal_mask import CausalMask
from upcast.integrations.litgpt.modules import SCORES, LitGPTForward
from upcast.integrations.litgpt.positions import first_of_run, is_causal
from upcast.integrations.litgpt.prefix_cache import Held, caches_of, content, in_one_call, rows_of, seal
from upcast.integrations.litgpt.versions import given, setting
from upcast.integrations.module_snapshot import Members
from upcast.kernels import native, transforms
from upcast.tensor import autocast
from upcast.tensor.genuine import Root, calls, originals

_NUMBERS = ("eps", "add_unit_offset", "normalized_shape", "mscale", "apply_sliding_window_attention", "config")
_AT_ONCE = 16  # positions of all rows that go through all blocks in one call

_wanted = threading.local()  # .last: the GPT of which this thread needs the last position only


def last_position(gpt: nn.Module, function: Callable[[], Any]) -> Any:
    """Return what ``function`` gives, of which this thread reads only the last position of ``gpt``'s logits."""
    return scopes.within(_wanted, "last", gpt, function)


def wants_last(gpt: nn.Module) -> bool:
    """Whether this thread reads only the last position of ``gpt``'s logits."""
    return getattr(_wanted, "last", None) is gpt


class Stack:
    """The steps of a GPT as it is now, and what tells that it has changed since."""

    def __init__(self, gpt: Any) -> None:
        found = [step_of(block, index) for index, block in enumerate(gpt.transformer.h)]
        self.steps = [step for step in found if step is not None]
        self.complete = len(self.steps) == len(found)
        kinds = {step.kind: step for step in self.steps}
        self._embedding = gpt.transformer.wte
        self.kinds = [*kinds.values()]  # a step of each kind
        self.kind_of = [[*kinds].index(step.kind) for step in self.steps]
        self._plain = native.can_call_blocks() and all(type(step) is Step for step in self.steps)
        self._arguments: tuple[tuple[Any, ...], ...] | None = None
        others = {id(each) for block in gpt.transformer.h for each in called(block)}
        modules = [each for each in gpt.transformer.h.modules() if id(each) not in others]
        ends = [gpt.transformer.ln_f, gpt.lm_head]
        self._members = Members(modules, also=(gpt, gpt.transformer), names=_NUMBERS, method=SCORES)
        self._ends = Members(ends, names=_NUMBERS)  # who watches these alone does not watch the blocks
        self._finish = finish_of(*ends)
        self.watched = self._members.watched
        self._originals = originals(_roots, *dict.fromkeys(map(type, (gpt, *modules, *ends))))
        self._configs = [*{id(each): each for each in map(_config, (gpt, *modules)) if each is not None}.values()]
        self._settings = self._set()
        self.caches = [step.cache for step in self.steps]

    def made_with(self) -> Any:
        """Return what keys and values depend on, beside tokens, embeddings and angles: all that the native call takes.

        None where that is not known: an embedding may do anything, and so may what is called as a module.
        """
        if any(isinstance(step, MixtureStep) for step in self.steps):
            return None
        embedding = self._embedding
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None or not unwatched_call(embedding):
            return None
        specs = [[*step.spec.items()] for step in self.steps]
        weights = [each for items in specs for each in items if isinstance(each, Tensor)]
        numbers = [[each for each in items if not isinstance(each, Tensor)] for items in specs]
        places = [(step.ring, step.rope) for step in self.steps]
        found = content(weights)
        return found and (found, numbers, places, self._set())

    def rows(self, gpt: Any, tokens: list[int]) -> Any:
        """Return what the caches hold for ``tokens``, with their embeddings and angles; None where that is not known.

        A ring that went around has lost the first ones.
        """
        count = len(tokens)
        kept = rows_of(caches_of(gpt))
        if not kept or count > min(each.shape[2] for each in kept):
            return None
        weight = self._embedding.weight
        embedded = nn.functional.embedding(torch.tensor(tokens), weight.detach())
        return content([*(each[:, :, :count] for each in kept), gpt.cos[:count], gpt.sin[:count], embedded])

    def in_one_call(self, x: Tensor) -> bool:
        """Whether `run` takes x (B, T, C): a whole batch, and few positions. More can be interrupted between blocks."""
        few = x.shape[0] * x.shape[1] <= _AT_ONCE
        return few and self._plain and all(kind.batch == x.shape[0] for kind in self.kinds)

    def finish(self) -> Any:
        """Return the norm and the head for `run`; None where someone watches them, or the native call has no such."""
        return None if self._ends.watched() else self._finish

    def run(self, x: Tensor, places: native.Places, last: int | None, finish: Any = None) -> Tensor:
        """Return what the last block, or ``finish``, gives for x (B, T, C), with a place for each of `kinds`."""
        at = 0
        while True:
            if self._arguments is None:
                self._arguments = tuple(map(Step.arguments, self.steps, self.kind_of))
            x, done = native.blocks(x, places, self._arguments[at:], last, finish)
            at += done
            if at == len(self.steps):
                return x
            self.steps[at].upcast()
            self._arguments = None

    def current(self) -> bool:
        """Whether nothing was replaced or reconfigured since."""
        return self._members.same() and self._ends.same() and self._set() == self._settings

    def genuine(self) -> bool:
        """Whether what the native call stands for is still LitGPT's and torch's own code."""
        return self._originals.intact()

    def _set(self) -> tuple[Any, ...]:
        values = chain.from_iterable(config.__dict__.values() for config in self._configs)
        return tuple([str(each) if type(each) in (list, dict) else each for each in values])  # they may be written to


class Reached(NamedTuple):
    """What a stack gives: the last block's output (B, T, C), or the logits that follow."""

    x: Tensor
    logits: bool


class FusedGPT(LitGPTForward):
    """LitGPT's GPT, for consecutive positions under its own causal mask."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stack: Stack | None = None
        self.held = Held()

    def genuine(self) -> bool:
        """Whether the model is what it was; of the code, the stack knows."""
        return type(self.module) is self.kind

    def fused(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        input_pos_maxp1: int | None = None,
        lm_head_chunk_size: int = 0,
    ) -> Any:
        start = self._start(idx, input_pos, input_pos_maxp1)
        stack = None if start is None else self._whole_stack()
        reached = None
        if start is not None and stack is not None:
            finish = None if lm_head_chunk_size else stack.finish()
            # What the kernels refuse, a vector that was converted in place, say: torch has a result, or its error.
            with contextlib.suppress(KernelError):
                if input_pos is None:
                    reached = self._blocks(stack, idx, start)
                else:
                    reached = self._with_caches(stack, idx, start, input_pos_maxp1, finish)
        if reached is None:
            return self.unfused(idx, *given(input_pos, input_pos_maxp1, lm_head_chunk_size or None))
        self.calls += 1
        return self._capped(reached.x) if reached.logits else self._logits(reached.x, lm_head_chunk_size)

    def unfused(self, *args: Any, **kwargs: Any) -> Any:
        """Run LitGPT's own forward, over caches as LitGPT has them."""
        if not torch.compiler.is_compiling():
            self.held.forget()
            if self.held.stale:
                self.held.clear(caches_of(self.module), 0)
        return super().unfused(*args, **kwargs)

    def _with_caches(self, stack: Stack, idx: Tensor, first: int, maxp1: int | None, finish: Any) -> Reached | None:
        """Return what the stack gives for idx (B, T), without the positions that the caches hold already.

        None where a cache does not take these positions. Only one sequence's tokens are kept in mind.
        """
        held, tokens = self.held, idx[0].tolist() if len(idx) == 1 else []
        made_with = self._made_with(stack, tokens) if first == 0 else None
        start = held.shared(tokens, made_with, self.rows) if made_with is not None else first
        batch, time = len(idx), first + idx.shape[1] - start
        places = [kind.place(start, batch, time, maxp1) for kind in stack.kinds]
        if None in places:
            return None
        known, held.tokens = held.tokens, []  # what an interrupted step leaves counts for nothing
        held.clear(stack.caches, start)
        reached = self._blocks(stack, idx[:, start - first :], start, places, finish)
        if reached is not None and made_with is not None:
            held.sealed, held.made_with, held.tokens = None, made_with, tokens
        elif reached is not None and first > 0:
            self._go_on(known, first, tokens)
        if not in_one_call(self.module):
            seal(self.module)
        return reached

    def _made_with(self, stack: Stack, tokens: list[int]) -> Any:
        """Return what a prompt of LLM.generate is computed from; None for others, of which nothing is kept in mind."""
        wanted, self.held.wanted = self.held.wanted, False
        return stack.made_with() if wanted and tokens and self._last_is_enough() else None

    def _go_on(self, known: list[int], start: int, tokens: list[int]) -> None:
        """Note that ``tokens`` from ``start`` on follow what was known; nothing counts behind them."""
        held = self.held
        if held.sealed is not None and start >= len(known):
            held.tokens = known  # these came later, when user code could run
        elif held.sealed is None and in_one_call(self.module) and tokens and self._last_is_enough():
            held.tokens = [*known[:start], *tokens] if start <= len(known) else []

    def rows(self, tokens: list[int]) -> Any:
        """Return what tells whether caches, embeddings and angles for ``tokens`` are the same; None if nothing does."""
        return self.stack and self.stack.rows(self.module, tokens)

    def _blocks(
        self, stack: Stack, idx: Tensor, start: int, places: Sequence[Any] | None = None, finish: Any = None
    ) -> Reached | None:
        """Return what the stack gives for idx (B, T) at ``start``; None for an embedding that was replaced.

        Of the last position alone, where that is enough.
        """
        gpt = self.module
        x = gpt.transformer.wte(idx)
        if gpt.config.scale_embeddings:
            x = x * torch.tensor(gpt.config.n_embd**0.5, dtype=x.dtype)
        if not self.free(x) or not x.is_contiguous():
            return None
        angles = self._angles(start, idx.shape[1])
        last = 1 if idx.shape[1] > 1 and self._last_is_enough() else None
        if places is not None and stack.in_one_call(x):
            at = tuple((*place, *angles[kind.rope], None) for place, kind in zip(places, stack.kinds, strict=True))
            return Reached(stack.run(x, at, last, finish), finish is not None)
        for step, kind in zip(stack.steps, stack.kind_of, strict=True):
            place = places[kind] if places is not None else None
            x = step.run(x, angles[step.rope], place, last if step is stack.steps[-1] else None)
        return Reached(x, logits=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "stack": None, "held": Held()}  # a copy collects its own

    def _start(self, idx: Tensor, input_pos: Tensor | None, maxp1: int | None) -> int | None:
        """Return the first position, or None if LitGPT's own forward has to do it (or to refuse it)."""
        gpt = self.module
        if kernels.active() is not native or transforms.active() or native.prefers_torch(idx.numel()):
            return None
        if autocast.enabled() or (torch.is_grad_enabled() and any(p.requires_grad for p in gpt.parameters())):
            return None
        if idx.dim() != 2 or not idx.numel() or idx.shape[1] > gpt.max_seq_length:
            return None
        if input_pos is None:
            return 0
        start = first_of_run(input_pos, idx.shape[1])
        mask = gpt.mask_cache
        if start is None or mask is None or (maxp1 is not None and maxp1 > gpt.max_seq_length):
            return None
        end = start + idx.shape[1]
        if end > gpt.cos.shape[0] or end > mask.shape[2]:
            return None
        causal = (type(mask) is CausalMask and mask.imagined) or is_causal(mask[:, :, start:end], start, end - start)
        return start if causal else None

    def _whole_stack(self) -> Stack | None:
        """Return a step for each block, or None if one of them is not for the native kernel."""
        stack = self.stack
        if stack is None or not stack.current():
            self.stack = stack = Stack(self.module)
        return stack if stack.complete and stack.genuine() and not stack.watched() else None

    def _angles(self, start: int, time: int) -> dict[int | None, Angles]:
        """Return cos and sin (T, n), under None or, of dual rope caches, under each index."""
        gpt = self.module
        cos, sin = gpt.cos[start : start + time], gpt.sin[start : start + time]
        indices = setting(gpt.config, "rope_indices")
        if indices is None:
            return {None: (cos, sin)}
        return {i: (cos[..., i].contiguous(), sin[..., i].contiguous()) for i in set(indices)}

    def _logits(self, x: Tensor, chunk: int) -> Any:
        gpt = self.module
        if self._last_is_enough():
            x = x[:, -1:]
        x = gpt.transformer.ln_f(x)
        if chunk > 0:
            return [self._capped(gpt.lm_head(part)) for part in x.split(chunk, dim=1)]
        return self._capped(gpt.lm_head(x))

    def _last_is_enough(self) -> bool:
        gpt = self.module
        if not wants_last(gpt) or any(map(hooked, (gpt, gpt.transformer.ln_f, gpt.lm_head))):
            return False
        return _each_by_itself(gpt.transformer.ln_f) and _each_by_itself(gpt.lm_head)

    def _capped(self, logits: Tensor) -> Tensor:
        limit = self.module.config.final_logit_softcapping
        return logits if limit is None else torch.tanh(logits / limit) * limit


def _each_by_itself(module: nn.Module) -> bool:
    """Whether ``module``, a norm or the head, is known to take each position by itself."""
    known = type(module).__module__.partition(".")[0] in ("litgpt", "torch")
    return known and isinstance(module.__dict__.get("forward"), (Forward, type(None)))


def _config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if hasattr(config, "__dict__") else None


def _roots(*kinds: type) -> list[Root]:
    """Return what a model and blocks of these kinds run, with the embedding before them, as the stack leaves it out."""
    return calls(nn.Embedding, *(kind for kind in kinds if not issubclass(kind, (nn.ModuleList, nn.ModuleDict))))

"""All layers of a model in one native call: Llama, and those whose forward is the same code.

The model's own forward runs, in whatever version of Transformers. It calls its layers one after the other; the first
of them does the work of all, and the others hand on what it gave. That happens only within that forward, whose code is
known to do nothing between two layers, and while nobody watches a layer or a module inside. Otherwise each layer does
its own: see `decoder_layer`.
"""

from typing import Any

from torch import Tensor, nn

from upcast.core import scopes
from upcast.core.errors import KernelError
from upcast.integrations.fused import fuses
from upcast.integrations.module_snapshot import Members
from upcast.integrations.transformers.decoder_layer import (
    NUMBERS,
    FusedDecoderLayer,
    has_mlp,
    layer_roots,
    rooms_for,
    running,
    spec_of,
)
from upcast.integrations.transformers.modules import TransformersForward, turns
from upcast.kernels import native
from upcast.kernels.block_spec import BlockSpec
from upcast.tensor.genuine import originals

_AT_ONCE = 16  # positions of all rows that go through all layers in one call: more can be interrupted between two


class FusedModel(TransformersForward):
    """The forward of a model of which the first layer may do the work of all."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._known: Stack | None = None  # replaced whole: threads share it

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        if _collects(self.module, kwargs) or not native.can_call_blocks():
            return self.unfused(*args, **kwargs)
        return scopes.within(running, "run", _Run(self), lambda: self.unfused(*args, **kwargs))

    def stack(self) -> "Stack | None":
        """Return the layers as they are now, or None where each has to do its own."""
        known = self._known
        if known is None or not known.current(self.module):
            self._known = known = Stack(self.module)
        return known if known.specs and known.undisturbed() else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": None}  # a copy collects its own


def _collects(model: Any, given: dict[str, Any]) -> bool:
    """Whether what layers return is collected between them, by the forward itself (before 5)."""
    names = ("output_hidden_states", "output_attentions")
    return any(given.get(name, getattr(model.config, name, False)) for name in names)


class Stack:
    """The layers that a model runs, as they are now, and what tells that they have changed since."""

    def __init__(self, model: Any) -> None:
        self.layers: list[Any] = _layers(model)
        inside = [module for layer in self.layers for module in layer.modules()]
        self._members = Members(inside, also=(model, model.layers), names=NUMBERS)
        self._originals = originals(layer_roots, *dict.fromkeys(map(type, inside)))
        found = [spec_of(layer) if fuses(layer, FusedDecoderLayer) else None for layer in self.layers]
        alike = len({getattr(layer, "attention_type", None) for layer in self.layers}) == 1  # under one mask, then
        self.specs: list[BlockSpec] = [spec for spec in found if spec is not None and has_mlp(spec)]
        widths = {spec.head_width for spec in self.specs}  # under the same angles, too
        if not alike or len(widths) != 1 or len(self.specs) < len(found):
            self.specs = []
        attentions = [layer.self_attn for layer in self.layers if self.specs]
        self.indices = [attention.layer_idx for attention in attentions]
        if len({*self.indices}) < len(self.indices):  # layers that share a cache append to it one after the other
            self.specs = []
        self.configs = [*{id(each.config): each.config for each in attentions}.values()]

    def current(self, model: Any) -> bool:
        """Whether nothing was replaced since, and the model runs as many."""
        return self._members.same() and len(self.layers) == min(len(model.layers), model.config.num_hidden_layers)

    def undisturbed(self) -> bool:
        """Whether nobody watches a module inside, and all of it is Transformers' and torch's own code, under SDPA."""
        if self._members.watched() or not self._originals.intact():
            return False
        return not any(layer.training for layer in self.layers) and all(
            config._attn_implementation == "sdpa" for config in self.configs
        )


def _layers(model: Any) -> list[Any]:
    return [*model.layers][: model.config.num_hidden_layers]


class _Run:
    """One call of a model's forward: what its first layer has done for the layers after it."""

    def __init__(self, model: FusedModel) -> None:
        self._model = model
        self._first: Any = next(iter(_layers(model.module)), None)
        self._output: Tensor | None = None
        self._left = 0  # layers that hand on the output

    def layer(self, layer: FusedDecoderLayer, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor | None:
        """Return what ``layer`` gives for x (B, T, C), or None if it has to do its own work."""
        if self._left and x is self._output:
            self._left -= 1
            return x
        if layer.module is not self._first or args or type(x) is not Tensor:
            return None
        self._first = None
        few = x.dim() == 3 and 0 < x.shape[0] * x.shape[1] <= _AT_ONCE
        stack = self._model.stack() if few and layer.fits_call(x, given) else None
        return None if stack is None else self._all(stack, x, given)

    def _all(self, stack: Stack, x: Tensor, given: dict[str, Any]) -> Tensor | None:
        cos, sin = given["position_embeddings"]
        room = rooms_for(x, given, stack.indices) if turns((cos, sin), x, stack.specs[0].head_width) else None
        if room is None:
            return None
        blocks = tuple([(0, *pair, spec) for pair, spec in zip(room.buffers, stack.specs, strict=True)])
        try:
            y, done = native.blocks(x, ((room.rows, room.rows, cos, sin, room.first),), blocks)
        except KernelError:  # a vector that was converted in place, say: torch has a result, or its error
            return None
        for layer in room.layers[:done]:
            layer.advance(room.rows + x.shape[1])
        if not done:
            return None
        self._output, self._left = y, done - 1
        return y

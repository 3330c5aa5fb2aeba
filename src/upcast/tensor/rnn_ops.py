"""LSTM, GRU and RNN with float16 weights: the equations of torch.nn, one step of time after the other.

torch's own kernels want all weights in float32 at once. Here the products go to the kernels: those with the input for
all steps together, those with the state once per step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upcast.core.functional import F
from upcast.kernels import transforms
from upcast.tensor import autocast
from upcast.tensor.matmul_ops import factor
from upcast.tensor.upcasting import call_upcast
from upcast.tensor.view_ops import handles, handles_each

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor, "Tensor | None"], State]


def _lstm_step(from_input: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    gates = from_input + F.linear(state[0], w_hh, b_hh)
    i, f, g, o = gates.chunk(4, dim=-1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_step(from_input: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    r_in, z_in, n_in = from_input.chunk(3, dim=-1)
    r_state, z_state, n_state = F.linear(state[0], w_hh, b_hh).chunk(3, dim=-1)
    z = (z_in + z_state).sigmoid()
    n = (n_in + (r_in + r_state).sigmoid() * n_state).tanh()
    return (n + z * (state[0] - n),)


def _tanh_step(from_input: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    return ((from_input + F.linear(state[0], w_hh, b_hh)).tanh(),)


def _relu_step(from_input: Tensor, state: State, w_hh: Tensor, b_hh: Tensor | None) -> State:
    return ((from_input + F.linear(state[0], w_hh, b_hh)).relu(),)


_CELLS: dict[Any, Cell] = {
    torch.lstm: _lstm_step,
    torch.gru: _gru_step,
    torch.rnn_tanh: _tanh_step,
    torch.rnn_relu: _relu_step,
}


@handles_each(*_CELLS)
def _recurrent(function: Any, first: Tensor, second: Any, third: Any, *args: Any) -> Any:
    """Dispatch the two forms: (input, hx, weights, ...) and (data, batch_sizes, hx, weights, ...)."""
    packed = isinstance(second, Tensor) and not second.is_floating_point()
    # Autocast gives each kind of cell dtypes of its own.
    if not factor(first) or not first.numel() or autocast.active() or transforms.jit_traces():
        return call_upcast(function, (first, second, third, *args), {})
    state = third if packed else second
    weights, (biases, layers, dropout, training, both, *batch_first) = (args[0], args[1:]) if packed else (third, args)
    if packed:
        sizes = second.tolist()
        steps = list(first.split(sizes))
    else:
        steps = list(first.unbind(1 if batch_first[0] else 0))
        sizes = [step.shape[0] for step in steps]
    states = state if function is torch.lstm else (state,)
    stack = _Stack(_CELLS[function], weights, biases, both, len(weights) // (layers * (2 if both else 1)))
    outputs, last = stack.run(steps, states, layers, dropout if training else 0.0)
    joined = torch.cat(outputs) if packed else torch.stack(outputs, 1 if batch_first[0] else 0)
    return (joined, *last)


class _Stack:
    """The layers of one call; ``weights`` is flat, ``per`` tensors for each layer and direction."""

    def __init__(self, cell: Cell, weights: Sequence[Tensor], biases: bool, both: bool, per: int) -> None:
        self.cell, self.biases, self.directions = cell, biases, 2 if both else 1
        self.weights = [weights[i : i + per] for i in range(0, len(weights), per)]

    def run(self, steps: list[Tensor], states: State, layers: int, dropout: float) -> tuple[list[Tensor], State]:
        """Return the outputs, one tensor per step of time, and the last states (layers * directions, batch, size)."""
        last: list[State] = []
        for layer in range(layers):
            sides = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                start = tuple(each[index] for each in states)
                side, state = self._layer(steps, start, self.weights[index], backwards=direction == 1)
                sides.append(side)
                last.append(state)
            steps = [torch.cat(parts, -1) for parts in zip(*sides, strict=True)]
            if dropout and layer < layers - 1:
                steps = [F.dropout(step, dropout) for step in steps]
        return steps, tuple(torch.stack(each) for each in zip(*last, strict=True))

    def _layer(
        self, steps: list[Tensor], start: State, weights: Sequence[Tensor], backwards: bool
    ) -> tuple[list[Tensor], State]:
        """Run one direction of one layer. Steps may have fewer rows as time goes on (packed sequences)."""
        w_ih, w_hh, *rest = weights
        b_ih, b_hh = rest[:2] if self.biases else (None, None)
        projection = rest[-1] if len(rest) % 2 else None
        sizes = [step.shape[0] for step in steps]  # len() would fix a size that torch.export leaves open
        from_input = F.linear(torch.cat(steps), w_ih, b_ih).split(sizes)
        outputs: list[Any] = [None] * len(steps)
        state = start
        for t in reversed(range(len(steps))) if backwards else range(len(steps)):
            rows = tuple(each[: sizes[t]] for each in state)
            new = self.cell(from_input[t], rows, w_hh, b_hh)
            if projection is not None:
                new = (F.linear(new[0], projection), *new[1:])
            outputs[t] = new[0]
            # rows that have not begun (backwards), or have ended (forwards), keep their state
            state = tuple(torch.cat([part, each[sizes[t] :]]) for part, each in zip(new, state, strict=True))
        return outputs, state


@handles(torch.lstm_cell)
def _lstm_cell(
    x: Tensor, hx: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> State:
    return _lstm_step(F.linear(x, w_ih, b_ih), tuple(hx), w_hh, b_hh)


def _single(step: Cell) -> Callable[..., Tensor]:
    def cell(
        x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Tensor:
        return step(F.linear(x, w_ih, b_ih), (hx,), w_hh, b_hh)[0]

    return cell


_SINGLE = {torch.gru_cell: _gru_step, torch.rnn_tanh_cell: _tanh_step, torch.rnn_relu_cell: _relu_step}
for _function, _step in _SINGLE.items():
    handles(_function)(_single(_step))

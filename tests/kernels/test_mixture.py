"""A mixture of experts in one call: against float64, in pieces, on every level, and what it refuses."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import relative_error
from upcast.core.errors import KernelError
from upcast.kernels import mixture, native, packed_native
from upcast.kernels.block_spec import NORMS, STORAGES, ExpertSpec, Matrix, Norm

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not there")


class Case(NamedTuple):
    rows: int
    chosen: int
    experts: int
    width: int
    hidden: int
    bias: bool = False
    activation: str = "silu"


CASES = {
    "a token": Case(1, 2, 8, 96, 200),
    "odd sizes": Case(5, 3, 7, 67, 33, bias=True),
    "a prompt": Case(70, 4, 16, 128, 96, activation="gelu_tanh"),
    "one expert for all": Case(40, 1, 1, 64, 64, activation="gelu"),
    "all experts for each": Case(3, 6, 6, 65, 130),
    "several groups": Case(3000, 2, 5, 64, 64),  # more choices than are worked on at once
    "an expert in pieces": Case(2500, 1, 1, 16, 4096),
    "no token": Case(0, 2, 4, 64, 64),
    "no choice": Case(3, 0, 4, 64, 64),
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Made(NamedTuple):
    x: Tensor
    indices: Tensor
    weights: Tensor
    experts: tuple[ExpertSpec, ...]


def matrix(rows: int, columns: int, bias: bool, storage: str) -> Matrix:
    weight = (torch.randn(rows, columns) * columns**-0.5).bfloat16()
    stored: Any = weight.half() if storage == "float16" else packed_native.pack(weight)
    return Matrix(stored, torch.randn(rows) if bias else None, STORAGES[storage])


def make(case: Case, storage: str = "float16") -> Made:
    shapes = [(case.hidden, case.width)] * 2 + [(case.width, case.hidden)]
    experts = [ExpertSpec(*(matrix(*shape, case.bias, storage) for shape in shapes)) for _ in range(case.experts)]
    order = torch.rand(case.rows, case.experts).argsort(-1)[:, : case.chosen]
    return Made(torch.randn(case.rows, case.width), order, torch.rand(case.rows, case.chosen), tuple(experts))


def in_float64(made: Made, activation: str) -> Tensor:
    y = torch.zeros_like(made.x, dtype=torch.float64)
    for number, expert in enumerate(made.experts):
        wide = []
        for weight, bias, _ in expert:
            plain = weight if isinstance(weight, Tensor) else packed_native.unpack(weight)
            wide.append((plain.double(), None if bias is None else bias.double()))
        token, choice = torch.where(made.indices == number)
        x = made.x[token].double()
        inner = ACTIVATIONS[activation](F.linear(x, *wide[0])) * F.linear(x, *wide[1])
        y.index_add_(0, token, made.weights[token, choice, None].double() * F.linear(inner, *wide[2]))
    return y


def run(made: Made, activation: str = "silu") -> Tensor:
    return mixture.mixture(made.x, made.indices, made.weights, made.experts, activation)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", CASES)
def test_the_sum_of_the_chosen_experts(isa: str, name: str, storage: str) -> None:
    case = CASES[name]
    made = make(case, storage)
    got = run(made, case.activation)
    expected = in_float64(made, case.activation)
    assert got.shape == made.x.shape
    assert got.dtype is torch.float32
    if case.rows and case.chosen:
        assert relative_error(got, expected) < 2e-6
    else:
        assert not got.any()


def test_a_row_has_the_same_bits_alone_and_among_others(isa: str) -> None:
    """And with any number of threads."""
    made = make(Case(19, 3, 6, 132, 70))
    before = torch.get_num_threads()
    together = run(made)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        alone = [
            run(made._replace(x=made.x[i, None], indices=made.indices[i, None], weights=made.weights[i, None]))
            for i in range(19)
        ]
        torch.set_num_threads(before)
        assert torch.equal(torch.cat(alone), together), threads


def test_an_expert_that_is_chosen_twice_counts_twice() -> None:
    made = make(Case(4, 2, 3, 64, 64))
    twice = made._replace(indices=torch.full_like(made.indices, 1))
    torch.testing.assert_close(run(twice).double(), in_float64(twice, "silu"), rtol=1e-5, atol=1e-6)


def test_strides_that_are_not_even() -> None:
    made = make(CASES["a prompt"])
    apart = made._replace(x=made.x.t().contiguous().t(), indices=made.indices.t().contiguous().t())
    assert torch.equal(run(apart, "gelu_tanh"), run(made, "gelu_tanh"))


def test_a_residual_is_what_the_sum_begins_with() -> None:
    made, residual = make(CASES["odd sizes"]), torch.randn(5, 67)
    got = mixture.mixture(made.x, made.indices, made.weights, made.experts, "silu", residual)
    torch.testing.assert_close(got, residual + run(made), rtol=1e-5, atol=1e-5)
    none = make(CASES["no choice"])
    residual = torch.randn(3, 64)
    assert torch.equal(mixture.mixture(*none, "silu", residual), residual)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="residual"):
        mixture.mixture(made.x, made.indices, made.weights, made.experts, "silu", residual)


def test_what_is_not_finite_stays_in_its_row() -> None:
    made = make(Case(6, 2, 4, 64, 64))
    plain = run(made)
    made.x[2, 5], made.x[4, 1] = torch.nan, torch.inf
    got = run(made)
    assert not got[[2, 4]].isfinite().any()
    assert torch.equal(got[[0, 1, 3, 5]], plain[[0, 1, 3, 5]])


def replaced(made: Made, number: int, **matrices: Matrix) -> tuple[ExpertSpec, ...]:
    experts = [*made.experts]
    experts[number] = experts[number]._replace(**matrices)
    return tuple(experts)


def half(rows: int, columns: int) -> Matrix:
    return Matrix(torch.zeros(rows, columns).half())


ALL = torch.arange(4)[None]  # chosen by one row
REFUSED: dict[str, tuple[Any, str]] = {
    "an expert that is none": (lambda m: {"indices": ALL + 1}, "expert 4 was chosen among 4; they are counted from 0"),
    "before the first": (lambda m: {"indices": ALL - 1}, "expert -1 was chosen among 4"),
    "too few weights": (lambda m: {"weights": m.weights[:, :3]}, r"indices and weights must be \(T, k\)"),
    "choices of other rows": (lambda m: {"indices": ALL.repeat(2, 1)}, r"indices and weights must be \(T, k\)"),
    "weights in double": (lambda m: {"weights": m.weights.double()}, "weights is"),
    "indices of another type": (lambda m: {"indices": ALL.int()}, "indices is int32"),
    "a list of experts": (lambda m: {"experts": [*m.experts]}, "experts must be a tuple"),
    "an expert cut short": (lambda m: {"experts": (*m.experts[:3], m.experts[3][:2])}, "an expert is no tuple of 3"),
    "another width": (lambda m: {"experts": replaced(m, 2, gate=half(48, 65))}, "an expert's matrices do not fit"),
    "a down of another shape": (lambda m: {"experts": replaced(m, 2, down=half(64, 49))}, "matrices do not fit"),
    "experts of several widths": (
        lambda m: {"experts": replaced(m, 2, gate=half(9, 64), up=half(9, 64), down=half(64, 9))},
        "experts of several widths; all have the same",
    ),
    "float32 weights": (lambda m: {"experts": replaced(m, 1, up=Matrix(torch.zeros(48, 64)))}, "up is float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    made = make(Case(1, 4, 4, 64, 48))._replace(indices=ALL)
    with pytest.raises(KernelError, match=message):
        run(made._replace(**change(made)))


def test_an_expert_that_nobody_chose_is_not_looked_at() -> None:
    made = make(Case(1, 2, 4, 64, 48))._replace(indices=torch.tensor([[0, 2]]))
    others = made._replace(experts=(made.experts[0], "none", made.experts[2], None))  # type: ignore[arg-type]
    assert torch.equal(run(others), run(made))


# --- the router -------------------------------------------------------------------------------------------------------


class Gate(NamedTuple):
    rows: int
    experts: int
    chosen: int
    norm: str = "rms"
    bias: bool = False
    storage: str = "float16"


GATES = {
    "a token": Gate(1, 8, 2),
    "a prompt": Gate(70, 128, 8),
    "all of them": Gate(3, 6, 6, norm="layer", bias=True),
    "one for all": Gate(5, 1, 1, norm="none"),
    "packed": Gate(4, 9, 3, storage="packed"),
    "no token": Gate(0, 4, 2),
}
WIDTH = 67


def norm_of(kind: str) -> Norm:
    weight = None if kind == "none" else torch.linspace(0.5, 2, WIDTH)
    return Norm(weight, torch.linspace(-1, 1, WIDTH) if kind == "layer" else None, NORMS[kind], 1e-5)


def normalised(x: Tensor, norm: Norm, kind: str) -> Tensor:
    if kind == "none":
        return x
    if kind == "layer":
        return F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, (WIDTH,), norm.weight, norm.eps)


@pytest.mark.parametrize("name", GATES)
def test_a_row_goes_to_the_experts_with_the_highest_scores(isa: str, name: str) -> None:
    case = GATES[name]
    x, norm = torch.randn(case.rows, WIDTH), norm_of(case.norm)
    gate = matrix(case.experts, WIDTH, case.bias, case.storage)
    normed, indices, weights = mixture.route(x, norm, gate, case.chosen)
    torch.testing.assert_close(normed, normalised(x, norm, case.norm), rtol=1e-5, atol=1e-6)
    plain = gate.weight if isinstance(gate.weight, Tensor) else packed_native.unpack(gate.weight)  # type: ignore[arg-type]
    scores, best = torch.topk(F.linear(normed, plain.float(), gate.bias), case.chosen)
    assert torch.equal(indices, best)
    torch.testing.assert_close(weights, scores.softmax(-1), rtol=1e-5, atol=1e-7)


# Scores of four experts, which two are chosen, and their weights.
SCORES = {
    "equal ones": ([3.0, 1.0, 3.0, 3.0], [0, 2], [0.5, 0.5]),
    "far apart": ([0.0, 6e4, -6e4, -1.0], [1, 0], [1.0, 0.0]),
    "minus infinity": ([-torch.inf, -1.0, -torch.inf, -torch.inf], [1, 0], [1.0, 0.0]),
    "a NaN is the highest": ([1.0, torch.nan, 5.0, 7.0], [1, 3], [torch.nan, torch.nan]),
    "infinity": ([1.0, torch.inf, 5.0, 7.0], [1, 3], [torch.nan, torch.nan]),  # as torch's softmax has it
    "negative ones": ([-3.0, -2.0, -4.0, -1.0], [3, 1], [0.7310586, 0.2689414]),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_of_every_kind(name: str) -> None:
    scores, best, expected = SCORES[name]
    gate = Matrix(torch.zeros(4, 3).half(), torch.tensor(scores))
    _, indices, weights = mixture.route(torch.ones(1, 3), Norm(), gate, 2)
    assert indices.tolist() == [best]
    torch.testing.assert_close(weights, torch.tensor([expected]), equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights, torch.tensor(scores)[best].softmax(0)[None], equal_nan=True, rtol=1e-6, atol=0)


def test_gates_that_do_not_fit_are_refused() -> None:
    for gate, chosen in ((half(4, 66), 2), (half(4, WIDTH), 5), (half(4, WIDTH), 0)):
        with pytest.raises(KernelError, match="the gate does not fit x or the choices"):
            mixture.route(torch.ones(2, WIDTH), Norm(), gate, chosen)

"""Numbers looked at, rounded, sampled and compared: native against the twin in plain PyTorch, to the last bit."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from upcast import UpcastError, kernels
from upcast.kernels import native, portable, reference, rounding
from upcast.kernels.reference import Survey

INF, NAN = math.inf, math.nan
# number, and what is counted: (nonfinite, out_of_range, nonzero, flushed)
NUMBERS: list[tuple[float, tuple[int, int, int, int]]] = [
    (0.0, (0, 0, 0, 0)),
    (-0.0, (0, 0, 0, 0)),
    (65504.0, (0, 0, 1, 0)),
    (-65504.0, (0, 0, 1, 0)),
    (65505.0, (0, 1, 1, 0)),
    (65519.9, (0, 1, 1, 0)),  # rounds to 65504 all the same: the rule is the number, not its rounding
    (65520.0, (0, 1, 1, 0)),
    (-3.4e38, (0, 1, 1, 0)),
    (2.0**-24, (0, 0, 1, 0)),
    (2.0**-25 * 1.001, (0, 0, 1, 0)),
    (2.0**-25, (0, 0, 1, 1)),
    (-1e-8, (0, 0, 1, 1)),
    (1e-45, (0, 0, 1, 1)),
    (INF, (1, 0, 1, 0)),
    (-INF, (1, 0, 1, 0)),
    (NAN, (1, 0, 0, 0)),
]
SIZES = [0, 1, 7, 31, 33, 129, 65537, 200_003]


@pytest.fixture(params=native.info()["available"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test at each level of this machine."""
    before = native.level()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def numbers(size: int, seed: int) -> Tensor:
    """Numbers over float16's whole range and beyond, with some of the table among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10 ** torch.empty(size).uniform_(-9, 6, generator=generator)
    for number, _ in NUMBERS:
        if size:
            x[int(torch.randint(size, (1,), generator=generator))] = number
    return x


@pytest.mark.parametrize(("number", "counts"), NUMBERS)
def test_one_number(each_isa: str, number: float, counts: tuple[int, ...]) -> None:
    x = torch.tensor([number])
    wanted = Survey(abs(x.item()) if math.isfinite(number) else 0.0, 0.0, *counts)
    assert native.survey(x) == reference.survey(x) == wanted


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_native_equals_its_twin(each_isa: str, size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = numbers(size, size)
    out, twin = torch.empty(size, dtype=torch.float16), torch.empty(size, dtype=torch.float16)
    assert native.survey(x) == portable.survey(x) == reference.survey(x)
    assert native.survey(x.half()) == portable.survey(x.half())
    assert native.survey(x, out) == portable.survey(x, twin) == native.survey(x, rounds=True)
    torch.set_num_threads(before)
    assert torch.equal(out.nan_to_num(1.5), twin.nan_to_num(1.5))
    assert torch.equal(out.isnan(), x.isnan())


@given(st.lists(st.floats(width=32), max_size=40))
def test_each_number_is_counted_by_itself(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    parts = [native.survey(each, rounds=True) for each in x.split(1)] if values else []
    assert native.survey(x, rounds=True) == (reference.add(parts) if parts else Survey())


def test_the_error_of_rounding_is_that_of_numbers_in_range() -> None:
    found = kernels.survey(torch.tensor([1.0, 1.0004, 1e9, INF]), rounds=True)
    assert found.max_error == pytest.approx(abs(1.0004 - 1.0), rel=1e-3)
    assert kernels.survey(torch.tensor([65519.0]), rounds=True).max_error == 0.0


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "permuted": lambda x: x.view(4, 5, -1).permute(2, 0, 1),
    "sliced": lambda x: x[:, ::3],
    "expanded": lambda x: x[:, :1].expand(20, 9),
    "scalar": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
    "empty, transposed": lambda x: x.new_empty(3, 0).t(),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_type(each_kernels: str, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](numbers(720, 3).view(20, 36).to(dtype))
    out, twin = (torch.empty_like(x, dtype=torch.float16) for _ in range(2))
    assert kernels.survey(x) == reference.survey(x)
    assert kernels.survey(x, out) == reference.survey(x, twin)
    assert torch.equal(out.nan_to_num(1.5), twin.nan_to_num(1.5))


def test_bfloat16_beyond_65504_is_out_of_range() -> None:
    """In bfloat16 itself 65504 is 65536, and a comparison would let it pass."""
    assert kernels.survey(torch.tensor([65536.0], dtype=torch.bfloat16)).out_of_range == 1


def test_large_tensors_are_looked_at_in_steps() -> None:
    x = numbers(3 * portable.CHUNK, 5).view(3, 2, -1)
    assert portable.survey(x, torch.empty_like(x, dtype=torch.float16)) == native.survey(x, rounds=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("most", [1, 31, 256, 1000])
def test_samples_are_kept(each_kernels: str, layout: str, dtype: torch.dtype, step: int, most: int) -> None:
    x = LAYOUTS[layout](numbers(720, 4).view(20, 36).to(dtype))
    kept = torch.full((3, most), 4321.0)
    assert kernels.look(x, step, kept, 1) == reference.survey(x)
    wanted = x.flatten()[::step].float()[:most]
    assert torch.equal(kept[1, : len(wanted)].nan_to_num(1.5), wanted.nan_to_num(1.5))
    rest = torch.cat((kept[0], kept[1, len(wanted) :], kept[2]))
    assert torch.equal(rest, torch.full_like(rest, 4321.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [1, 5])
def test_numbers_are_compared_with_kept_ones(each_kernels: str, layout: str, dtype: torch.dtype, step: int) -> None:
    x, other = (LAYOUTS[layout](numbers(720, seed).view(20, 36).to(dtype)) for seed in (4, 5))
    kept = torch.zeros(2, 700)
    kernels.look(other, step, kept, 1)
    got, want = (each.flatten()[::step][:700].to(dtype).float().double() for each in (x, other))
    usable = got.isfinite() & (want.abs() < 1e30)
    off, size = (got - want)[usable].square().sum(), want[usable].square().sum()
    nonfinite, *sums = kernels.compare(x, step, kept, 1, 1e30)
    assert nonfinite == x.numel() - int(x.isfinite().count_nonzero())
    assert sums == pytest.approx([float(off), float(size)], rel=1e-12)


def test_masks_and_numbers_that_are_not_finite_are_not_compared(each_kernels: str) -> None:
    got, kept = torch.tensor([1.0, INF, NAN, 3.0, 5.0]), torch.tensor([[2.0, 1.0, 1.0, -3.4e38, 5.0]])
    assert kernels.compare(got, 1, kept, 0, 1e30) == (2, 1.0, 29.0)
    assert kernels.compare(kept[0], 1, got[None], 0, INF) == (0, pytest.approx(3.4e38**2), 35.0)


REFUSED = {
    "type": (lambda: native.survey(torch.zeros(3, dtype=torch.int64)), "x"),
    "strides": (lambda: native.survey(torch.zeros(3, 4).t()), "x"),
    "out's type": (lambda: native.survey(torch.zeros(3), torch.zeros(3)), "out"),
    "out's size": (lambda: native.survey(torch.zeros(3), torch.zeros(4).half()), "4 elements for 3"),
    "out of halves": (lambda: native.survey(torch.zeros(3).half(), torch.zeros(3).half()), "x"),
    "a row too many": (lambda: native.look(torch.zeros(10), 4, torch.zeros(2, 4), 2), "row 2 of 2"),
    "a row before the first": (lambda: native.compare(torch.zeros(10), 4, torch.zeros(2, 4), -1, 1.0), "row -1 of 2"),
    "no step": (lambda: native.look(torch.zeros(10), 0, torch.zeros(2, 4), 1), "steps count from 1"),
    "kept halves": (lambda: native.look(torch.zeros(3), 1, torch.zeros(2, 4).half(), 1), "kept"),
    "kept in one dimension": (lambda: native.look(torch.zeros(3), 1, torch.zeros(4), 0), "kept has 1 dimensions"),
    "kept apart": (lambda: native.look(torch.zeros(3), 1, torch.zeros(4, 2).t(), 0), "kept is not contiguous"),
    "look at integers": (lambda: native.look(torch.zeros(3, dtype=torch.int64), 1, torch.zeros(2, 4), 0), "x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_cannot_take_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(UpcastError, match=message):
        call()


HALVES = {
    "ordinary": torch.linspace(-3, 3, 63).view(7, 9),
    "transposed": torch.linspace(-3, 3, 63).view(7, 9).t(),
    "ends": torch.tensor([[0.0, -0.0, 6e-8, 65504.0]]),
    "not finite": torch.tensor([[float("nan"), float("inf"), 1.0]]),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("name", HALVES)
def test_float16_is_measured_as_if_it_were_rounded_again(name: str) -> None:
    """It is only looked at, which says the same of it."""
    half = HALVES[name].half()
    found = reference.survey(half, rounds=True)
    assert found.nonfinite or (found.max_error, found.flushed) == (0, 0)
    assert rounding.measure(half) == rounding.Rounding(out_of_range=found.out_of_range, nonfinite=found.nonfinite)

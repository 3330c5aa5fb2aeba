"""Fixtures of the kernel tests: every instruction-set level this machine runs."""

from collections.abc import Iterator

import pytest
import torch

from upcast.kernels import native

LEVELS = native.info()["available"]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on one level, and returns to the best afterwards."""
    native.set_isa(request.param)
    assert native.info()["isa"] == request.param
    yield request.param
    native.set_isa(LEVELS[0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""Several threads that patch: what they do to one another, and to the rest of the program."""

import sys
import threading
from collections.abc import Iterator

import pytest
from torch import nn

import upcast


@pytest.fixture(autouse=True)
def turns() -> Iterator[None]:
    """Python's threads take turns hundreds of times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_a_patch_breaks_no_tuple_that_another_thread_makes() -> None:
    failed, stop = list[BaseException](), threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                tuple(number for number in range(30))
            except SystemError as error:  # somebody else held the tuple while it grew
                failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(30):
        model = nn.Linear(9, 9)
        parameters = [*model.parameters()]  # an optimizer could be what holds them
        upcast.patch(model)
        del parameters
    stop.set()
    thread.join()
    assert not failed

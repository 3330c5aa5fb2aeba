"""Several threads that patch: what they do to one another, and to the rest of the program."""

import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import half_weights
from tests.interruptions import picture
from upcast.integrations.litgpt import generation
from upcast.patching.parts import RECORD


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
    for _ in range(200):
        model = nn.Linear(9, 9)
        parameters = [*model.parameters()]  # an optimizer could be what holds them
        upcast.patch(model)
        del parameters
    stop.set()
    thread.join()
    assert not failed


# --- a model and its parts --------------------------------------------------------------------------------------------


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)), nn.Linear(9, 9), nn.Sequential(nn.GRU(9, 7)))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 9), nn.Linear(9, 9), nn.Linear(9, 9, bias=False))
    model[2].weight = model[0].weight
    return model


# model -> its parts that are patched by themselves
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[nn.Module]]]] = {
    "nested": (nested, lambda m: [m[0], m[0][0], m[2], m[2][0], m[:2]]),
    "tied": (tied, lambda m: [m[0], m[1], m[2]]),
}


def exact(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model of which float16 loses nothing."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def borrow(model: nn.Module) -> None:
    with upcast.patched(model):
        pass


ACTIONS = (upcast.patch, upcast.patch, upcast.unpatch, upcast.unpatch, upcast.report, upcast.plan, borrow)
REFUSALS = ("another thread", "is patched already", "is not patched by upcast", "is a piece of")


def at_once(count: int, work: Callable[[int], None]) -> None:
    """Run ``work`` in so many threads."""
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.usefixtures("few_lines")
@pytest.mark.parametrize("name", MODELS)
def test_threads_change_a_model_and_its_parts_one_at_a_time(name: str) -> None:
    make, parts_of = MODELS[name]
    plain, wrong, done = picture(exact(make)), list[BaseException](), set[str]()
    for seed in range(40):
        model = exact(make)
        parts = [model, *parts_of(model)]

        def work(number: int, parts: list[nn.Module] = parts, seed: int = seed) -> None:
            draw = random.Random(4 * seed + number)
            for _ in range(8):
                try:
                    action = draw.choice(ACTIONS)
                    action(draw.choice(parts))
                    done.add(action.__name__)
                except BaseException as error:
                    refused = isinstance(error, upcast.UpcastError) and any(line in str(error) for line in REFUSALS)
                    wrong.extend([error] * (not refused))

        at_once(4, work)
        assert not wrong
        for part in (*parts, *reversed(parts)):
            unpatch_what_is_patched(part)
        assert not half_weights(model)
        assert picture(model) == plain
    assert done == {action.__name__ for action in ACTIONS}


def unpatch_what_is_patched(model: nn.Module) -> None:
    if half_weights(model) or any(RECORD in vars(module) for module in model.modules()):
        upcast.unpatch(model)


def test_a_look_makes_a_patch_wait_and_does_not_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looks, order = nn.Sequential(nn.Linear(9, 9)), threading.Event(), list[str]()

    def patch() -> None:
        looks.wait()
        upcast.patch(model)
        order.append("patched")

    patching = threading.Thread(target=patch)

    def look(root: nn.Module) -> tuple[str, ...]:
        if threading.current_thread() is not patching and not order:
            looks.set()
            patching.join(0.1)
            order.append("looked")
        return ()

    monkeypatch.setattr("upcast.core.extensions.remarks", look)
    patching.start()
    assert "convert" in str(upcast.plan(model))
    patching.join()
    assert order == ["looked", "patched"]
    assert half_weights(model)


def test_the_end_of_a_block_waits_for_who_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, begun, at_end = nn.Linear(9, 9), threading.Event(), threading.Event()
    first, original = model.weight, upcast.patching.transaction.unpatch

    def slow(*args: object) -> None:
        begun.set()
        at_end.wait(0.1)
        original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("upcast.patching.transaction.unpatch", slow)
    other = threading.Thread(target=upcast.unpatch, args=(model,))
    with upcast.patched(model):
        other.start()
        begun.wait()
    at_end.set()
    assert not other.is_alive()
    assert model.weight is first
    other.join()


def test_who_is_refused_leaves_what_another_thread_has_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, errors = nn.Linear(9, 9), list[str]()

    def enter() -> None:
        try:
            borrow(model)
        except upcast.UpcastError as error:
            errors.append(str(error))

    original = upcast.patching.hooks.install

    def meanwhile(root: nn.Module, unpatch: Any, *, shortcuts: bool) -> None:
        original(root, unpatch, shortcuts=shortcuts)
        at_once(1, lambda _: enter())

    monkeypatch.setattr("upcast.patching.hooks.install", meanwhile)
    upcast.patch(model)
    assert ["another thread is" in error for error in errors] == [True]
    assert half_weights(model)
    assert RECORD in vars(model)
    upcast.unpatch(model)


@pytest.mark.usefixtures("no_other_gpt")
def test_a_model_of_litgpt_that_comes_while_the_last_one_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("litgpt.generate.base")
    first, original, models = base.next_token, generation._wrapped, [nn.Module(), nn.Module()]
    comes = threading.Thread(target=generation.enter, args=(models[1],))

    def slow() -> Iterator[tuple[Any, str, Any]]:
        if threading.current_thread() is not comes:
            comes.start()
            comes.join(0.1)
        yield from original()

    generation.enter(models[0])
    monkeypatch.setattr(generation, "_wrapped", slow)
    generation.leave(models[0])
    comes.join()
    monkeypatch.setattr(generation, "_wrapped", original)
    assert hasattr(base.next_token, "_upcast_original")
    generation.leave(models[1])
    assert base.next_token is first

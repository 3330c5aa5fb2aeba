"""A pipeline of several models, as Diffusers has them: all are patched, or none."""

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import upcast
from tests.conftest import assert_patched
from tests.models import IDS, Net, snapshot
from upcast.patching import engine
from upcast.tensor.half_weight import HalfWeight


class Pipeline:
    """What there is of Diffusers' pipelines in it."""

    def __init__(self, **components: Any) -> None:
        self.components = components


def pipeline() -> Pipeline:
    shared = Net().eval()
    return Pipeline(first=shared, scheduler=object(), second=Net().eval(), again=shared, third=Net().eval())


def models(pipe: Pipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def is_plain(model: nn.Module) -> bool:
    return not any(isinstance(p, HalfWeight) for p in model.parameters()) and "_upcast" not in model.__dict__


def test_all_of_them_are_patched_and_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    planned = upcast.plan(pipe)
    assert {change.name.partition(".")[0] for change in planned.changes} == {"first", "second", "third"}
    with caplog.at_level("INFO", "upcast"):
        assert upcast.patch(pipe) is pipe
    assert caplog.text.count("Net ") == 3  # one that stands there twice is patched once
    for model in models(pipe).values():
        assert_patched(model)
        assert model.__dict__["_upcast"].lent is None  # nobody holds the float32 weights any longer
    assert upcast.report(pipe).count("policy: ") == 3
    with pytest.raises(upcast.UpcastError, match="is patched already"):
        upcast.patch(pipe)
    upcast.unpatch(pipe)
    assert all(map(is_plain, models(pipe).values()))


def test_what_is_patched_already_stays(caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline()
    upcast.patch(pipe.components["second"], policy="none")
    with caplog.at_level("INFO", "upcast"):
        upcast.patch(pipe)
    assert "patched already, and left as they were: second" in caplog.text
    assert "policy: none" in upcast.report(pipe.components["second"])
    assert_patched(pipe.components["third"])


@pytest.mark.parametrize("end", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("which", [2, 3])
def test_none_is_where_one_cannot_be(which: int, end: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls, install = pipeline(), [0], engine._install
    before = {name: (snapshot(model), model(IDS)) for name, model in models(pipe).items()}

    def fails(*arguments: Any) -> None:
        calls[0] += 1
        install(*arguments)
        if calls[0] == which:
            raise end

    monkeypatch.setattr(engine, "_install", fails)
    with pytest.raises(end):
        upcast.patch(pipe)
    assert calls == [which]
    for name, model in models(pipe).items():
        assert snapshot(model) == before[name][0]
        assert torch.equal(model(IDS), before[name][1])


def test_one_that_is_refused_keeps_all_from_it() -> None:
    pipe = pipeline()
    pipe.components["third"].to("meta")
    with pytest.raises(upcast.UpcastError, match="on the meta device"):
        upcast.patch(pipe)
    assert all(map(is_plain, models(pipe).values()))


def test_models_that_share_a_weight_are_refused() -> None:
    pipe = pipeline()
    pipe.components["third"].head.weight = pipe.components["second"].head.weight
    with pytest.raises(upcast.UpcastError, match=r"second and third of this pipeline share head\.weight"):
        upcast.patch(pipe)
    assert all(map(is_plain, models(pipe).values()))


def test_for_a_block() -> None:
    pipe = pipeline()
    before = {name: dict(model.named_parameters()) for name, model in models(pipe).items()}
    with contextlib.suppress(ZeroDivisionError), upcast.patched(pipe):
        for model in models(pipe).values():
            assert_patched(model)
        raise ZeroDivisionError
    for name, model in models(pipe).items():
        assert all(parameter is before[name][key] for key, parameter in model.named_parameters())

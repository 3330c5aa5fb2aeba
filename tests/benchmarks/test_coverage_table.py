"""A part of the coverage table on every run, and that the published page is that of the whole table."""

from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("litgpt")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tests.coverage_table import everything, page
from tests.coverage_table.case import Case, Missing
from tests.coverage_table.exceptions import CAUSES
from tests.coverage_table.measure import measure

CASES = list(everything())
FAST = [case for case in CASES if isinstance(case, Case) and case.fast]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as tiny as these would mostly wait for the second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # Transformers' and torch's own, about tiny configs
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.group}-{case.name}") for case in FAST])
def test_row(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    row = measure(case)
    if case.name in CAUSES:
        assert row.wrong, f"{case.name} is green now: take it out of exceptions.py"
        assert "float32 copy" in row.wrong
    else:
        assert not row.wrong


def test_a_wrong_model_is_not_green(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in FAST if case.name == "Linear")
    monkeypatch.setattr("upcast.kernels.native.linear", lambda x, w, b=None: x @ w.float().t() * 1.0001 + b)
    assert "forward differs" in measure(case).wrong


def test_the_fast_part_has_every_group() -> None:
    assert {case.group for case in FAST} == {case.group for case in CASES}


def test_every_name_of_litgpt_and_every_decoder_of_transformers_has_a_row() -> None:
    from litgpt.config import name_to_config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as decoders

    names = {case.name.split(" (")[0] for case in CASES}
    assert set(name_to_config) <= names
    assert set(decoders) <= names


def test_the_page_is_that_of_these_cases() -> None:
    if any(f"{name} {version(name)}" not in page.versions() for name in page.LIBRARIES):
        pytest.skip(f"the page was written with other versions: {page.versions()}")
    rows = [case.name + (f" ({case.note})" if case.note else "") for case in CASES if isinstance(case, Case)]
    assert page.names() == rows, "run `make coverage-table`"
    text = page.PAGE.read_text()
    assert all(f"{case.name}: {case.cause}" in text for case in CASES if isinstance(case, Missing))
    assert text.count("| exception |") == len(CAUSES)

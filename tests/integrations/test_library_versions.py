"""What a library's version lacks costs the fused forwards, never the numbers, and the plan says why."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import upcast
from tests.conftest import Run, assert_patched, relative_error, rounded
from tests.litgpt_checkpoints import small_config
from tests.transformers_models import TEXT, make
from tests.versions.matrix import ROWS
from upcast.core import torch_private
from upcast.core.forward_override import kept
from upcast.integrations.fused import Fused
from upcast.integrations.litgpt import versions as litgpt_versions
from upcast.integrations.transformers import versions as transformers_versions
from upcast.integrations.versions import newer, numbers

IDS = torch.arange(3, 17).view(2, 7)
Change = Callable[[pytest.MonkeyPatch], None]


def litgpt() -> Any:
    from litgpt import GPT

    return GPT(small_config("pythia-160m")).eval()


def llama() -> Any:
    return make("LlamaForCausalLM", "LlamaConfig", TEXT)


# model, what is missing of its library, what the plan says
LACKING: dict[str, tuple[Callable[[], Any], Change, str]] = {
    "a class of LitGPT": (
        litgpt,
        lambda patch: patch.setattr(litgpt_versions, "CLASSES", ("NoSuchClass",)),
        "not fused: LitGPT's modules (this version of it has no class NoSuchClass)",
    ),
    "a setting of LitGPT": (
        litgpt,
        lambda patch: patch.setattr(litgpt_versions, "SETTINGS", ("no_such_setting",)),
        "not fused: LitGPT's modules (this version of it has no no_such_setting)",
    ),
    "a later LitGPT": (litgpt, lambda patch: patch.setattr(litgpt_versions, "NEWEST", "0.5.1"), "is newer than 0.5.1"),
    "a name of torch": (
        litgpt,
        lambda patch: patch.setattr(torch_private, "FAST_PATHS", {"nn.modules.no_such_name|nn.no_such_name": "2.8"}),
        "has no torch.nn.modules.no_such_name",
    ),
    "a class of Transformers": (
        llama,
        lambda patch: patch.setattr(transformers_versions, "NAMES", {"transformers.cache_utils": ("NoSuchCache",)}),
        "not fused: this version of Transformers has no transformers.cache_utils.NoSuchCache",
    ),
    "a module of Transformers": (
        llama,
        lambda patch: patch.setattr(transformers_versions, "NAMES", {"transformers.no_such_module": ("Cache",)}),
        "not fused: this version of Transformers has no transformers.no_such_module.Cache",
    ),
    "a later Transformers": (
        llama,
        lambda patch: patch.setattr(transformers_versions, "NEWEST", "5.1"),
        "is newer than 5.1",
    ),
}


@pytest.fixture
def _asked_again() -> Iterator[None]:
    transformers_versions.why_unfused.cache_clear()
    yield
    transformers_versions.why_unfused.cache_clear()


@pytest.mark.usefixtures("_asked_again")
@pytest.mark.parametrize("what", LACKING)
def test_what_is_missing_costs_the_fast_path_alone(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    build, change, said = LACKING[what]
    torch.manual_seed(0)
    model = build()
    plain = rounded(model)
    change(monkeypatch)
    lines = [line for line in str(upcast.plan(model)).splitlines() if "not fused" in line]
    assert len(lines) == 1
    assert said in lines[0]
    upcast.patch(model)
    assert_patched(model)
    assert not any(isinstance(each, Fused) for module in model.modules() for each in kept(module))
    with torch.inference_mode():
        got, want = (getattr(out, "logits", out) for out in (model(IDS), plain(IDS)))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("build", [litgpt, llama])
def test_of_the_versions_here_nothing_is_missing(build: Callable[[], Any]) -> None:
    model = upcast.patch(build())
    assert any(isinstance(each, Fused) for module in model.modules() for each in kept(module))
    assert "not fused" not in str(upcast.plan(build()))


def test_versions_are_compared_by_their_numbers() -> None:
    assert numbers("2.13.0+cpu") == (2, 13, 0)
    assert numbers("5.0.0rc1") == (5, 0, 0)
    assert not newer("no-such-library", "1.0")
    assert "is newer than 1.0" in newer("torch", "1.0")
    assert not newer("torch", ".".join(torch.__version__.split(".")[:2]))


def test_a_torch_without_what_weights_need_is_told_in_one_line(python_with_libraries: Run) -> None:
    script = "import torch; del torch._C._swap_tensor_impl; import upcast"
    said = python_with_libraries("-c", script).stderr.splitlines()[-1]
    assert "has no torch._C._swap_tensor_impl; upcast was run with" in said


def test_and_breaks_no_program(python_with_libraries: Run) -> None:
    script = "import torch; del torch._C._len_torch_dispatch_stack; import types, _upcast_startup as hook; "
    script += "[hook._activate(types.ModuleType(name)) for name in ('litgpt.api', 'litgpt.chat.base')]; print('fine')"
    done = python_with_libraries("-W", "always", "-c", script)
    assert done.stdout == "fine\n"
    assert done.stderr.count("upcast is not active for litgpt.api: torch") == 1


def test_declared_ranges_are_what_is_run() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for library in ("torch", "litgpt", "transformers", "diffusers", "peft", "accelerate"):
        run = sorted(numbers(row.version) for row in ROWS if row.library == library)
        oldest, operator, newest = re.findall(rf'"{library}>=([\d.]+),(<=?)([\d.]+)"', text)[0]
        assert numbers(oldest) == run[0][: len(numbers(oldest))], library
        if operator == "<=":
            assert numbers(newest) == run[-1], library
        else:  # the next minor version
            major, minor = numbers(newest)
            assert (major, minor - 1) == run[-1][:2], library

"""Which kernels run: by name, and never silently another."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import upcast
from tests.conftest import Run, relative_error
from upcast import kernels
from upcast.kernels import native, native_library, portable
from upcast.tensor.half_weight import HalfWeight

ROOT = Path(__file__).parents[2]
CALLED = """
import torch, upcast
from upcast.kernels import native, native_library, portable
calls = []
for module in (native, portable):
    def record(*args, _linear=module.linear, _name=module.__name__):
        calls.append(_name.rpartition(".")[2])
        return _linear(*args)
    module.linear = record
upcast.patch(torch.nn.Linear(33, 31).eval())(torch.ones(2, 33))
print(calls)
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_active", None)


def test_where_there_is_a_compiler_the_native_kernels_are_there() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert native.available(), native.load_error()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(upcast.UpcastError, match="kernels 'fast'; it must be one of auto, native, portable"):
        kernels.use("fast")


@pytest.mark.parametrize(("variables", "called"), [({}, "native"), ({"UPCAST_KERNELS": "portable"}, "portable")])
def test_what_was_asked_for_is_what_runs(python_with_libraries: Run, variables: dict[str, str], called: str) -> None:
    result = python_with_libraries("-c", CALLED, **variables)
    assert result.stdout.strip() == f"['{called}']", result.stderr
    assert f"{called} (" in result.stderr


def test_native_where_it_cannot_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "_module", None)
    monkeypatch.setattr(native_library, "_load_error", "no C++ compiler was found when upcast was installed")
    with pytest.raises(upcast.UpcastError, match=r"cannot be loaded \(no C\+\+ compiler was found"):
        kernels.use("native")
    assert kernels.use("auto") is portable
    assert kernels.describe() == "portable (no C++ compiler was found when upcast was installed)"


def test_a_failed_choice_of_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCAST_KERNELS", "fast")
    model = torch.nn.Linear(3, 3).eval()
    with pytest.raises(upcast.UpcastError, match="UPCAST_KERNELS='fast'"):
        upcast.patch(model)
    assert type(model.weight) is torch.nn.Parameter


def test_every_instruction_set_of_the_machine_can_be_forced(python_with_libraries: Run) -> None:
    for isa in native.info()["available"]:
        result = python_with_libraries("-m", "upcast", "status", UPCAST_ISA=isa)
        assert f"native ({isa})" in result.stdout, result.stderr
    other = "aarch64" if "x86-64" in native.info()["available"] else "x86-64"
    result = python_with_libraries("-m", "upcast", "status", UPCAST_ISA=other)
    assert result.returncode == 2
    assert "cannot run here; this machine runs" in result.stderr


@pytest.mark.parametrize("transposed", [False, True])
def test_only_experts_in_use_are_read(each_kernels: str, transposed: bool) -> None:
    stored = torch.randn(5, 33, 31).half()
    stored[[1, 3, 4]] = float("nan")  # whatever reads them shows it
    weight = HalfWeight(stored.mT.contiguous().mT if transposed else stored)
    x = torch.randn(7, 33)
    counts = torch.tensor([3, 0, 4, 0, 0])
    got = kernels.grouped_linear(x, weight.stored, counts)
    want = torch.cat([x[:3] @ stored[0].float(), x[3:] @ stored[2].float()])
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_without_a_compiler_the_install_succeeds_and_says_why(tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(target)]
    environment = {**os.environ, "CXX": "/no/such/compiler"}
    subprocess.run([*install, "-C", f"build-dir={tmp_path / 'build'}", str(ROOT)], check=True, env=environment)
    script = "import upcast.kernels as k; print(k.describe())"
    packages = [str(target), *site.getsitepackages()]
    without_site = [sys.executable, "-S", "-c", script]  # or an editable install of this tree would come first
    result = subprocess.run(
        without_site, env={"PYTHONPATH": os.pathsep.join(packages)}, capture_output=True, text=True, check=True
    )
    assert "portable (no C++ compiler was found when upcast was installed)" in result.stdout


@pytest.mark.parametrize(
    ("level", "rows", "columns", "by_torch"),
    [
        ("x86-64-v3", kernels.LONG, 40, True),
        ("x86-64-v3", kernels.LONG - 1, 40, False),
        ("x86-64-v3", kernels.LONG, 51, False),
        ("x86-64-v4", kernels.LONG, 40, False),
    ],
)
def test_on_avx2_torch_multiplies_many_rows_with_a_small_transposed_weight(
    monkeypatch: pytest.MonkeyPatch, level: str, rows: int, columns: int, by_torch: bool
) -> None:
    if not native.available():
        pytest.skip("no native kernels to choose against")
    calls: list[str] = []

    def counted(name: str) -> None:
        module = {"native": native, "portable": portable}[name]
        product = module.matmul
        monkeypatch.setattr(module, "matmul", lambda *args: calls.append(name) or product(*args))

    monkeypatch.setattr(kernels, "_active", native)
    monkeypatch.setattr(native, "level", lambda: level)
    monkeypatch.setattr(portable, "TILE", 24 * 50)
    counted("native")
    counted("portable")
    x, weight = torch.randn(rows, 24), torch.randn(24, columns).half()
    got = kernels.linear(x, weight.t())
    assert calls == ["portable" if by_torch else "native"]
    assert relative_error(got, x.double() @ weight.double()) < 1e-6

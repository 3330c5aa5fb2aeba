"""Policies that run: what is not upcast is plain float16, bit for bit, and what is upcast really runs in float32."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions
from torch.utils._python_dispatch import TorchDispatchMode

import upcast
from tests.conftest import assert_patched, relative_error
from tests.transformers_models import FAMILIES, first_output, make
from upcast.patching import engine
from upcast.policy import module_scope, op_classes
from upcast.policy.policy import CLASSES, Policy

LARGE = 60000.0  # float16 holds it, and not twice it


def run_under(model: nn.Module, policy: Policy) -> Any:
    """Patch a model and put it under a policy through the mode, also where patch itself would not need it."""
    upcast.patch(model, policy="none")
    module_scope.change(model, engine.record_of(model).selection, policy)
    return model


def halved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_function_that_torch_lets_one_override_is_listed_or_left_out() -> None:
    every = [function for functions in get_overridable_functions().values() for function in functions]
    assert len(every) > 1000
    assert [op_classes.name_of(f) for f in every if not op_classes.listed(f)] == []


def test_no_function_is_listed_twice() -> None:
    names = [name for names in (*op_classes._NAMES.values(), *op_classes.LEFT_OUT.values()) for name in names.split()]
    assert sorted(names) == sorted(set(names))


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in FAMILIES])
def test_none_is_half_bit_for_bit_and_safe_through_the_mode_is_safe(row: Any) -> None:
    kind, config, sizes, inputs = row
    model = make(kind, config, sizes)
    safe = first_output(upcast.patch(copy.deepcopy(model)), inputs)
    half = first_output(copy.deepcopy(model).half(), halved(inputs))
    none = upcast.patch(copy.deepcopy(model), policy="none")
    assert_patched(none)
    got = first_output(none, inputs)
    assert got.dtype == half.dtype
    assert torch.equal(got, half)
    assert not torch.equal(got.float(), safe)
    wide = first_output(run_under(copy.deepcopy(model), Policy()), inputs)
    assert wide.dtype == torch.float32
    assert relative_error(wide, safe) < 1e-5


@pytest.mark.parametrize("name", ["pythia-14m", "Llama-3.2-1B", "Gemma-2-2b", "Qwen3-0.6B"])
def test_none_is_half_in_litgpt_with_its_cache(name: str) -> None:
    from litgpt import GPT

    from tests.litgpt_checkpoints import small_config

    model = GPT(small_config(name)).eval()
    half, none = copy.deepcopy(model).half(), upcast.patch(copy.deepcopy(model), policy="none")
    ids = torch.arange(1, 13)[None]
    with torch.inference_mode():
        assert torch.equal(none(ids), half(ids))
        for each, dtype in ((half, torch.float16), (none, None)):
            each.set_kv_cache(1, 16, dtype=dtype)
        for start, end in ((0, 8), (8, 9), (9, 10)):
            where = torch.arange(start, end)
            assert torch.equal(none(ids[:, where], where), half(ids[:, where], where))
    assert none.transformer.h[0].attn.kv_cache.k.dtype == torch.float16


@pytest.mark.parametrize("policy", ["norm+residual+linear", "scores", "safe; lm_head=none"])
def test_a_float32_cache_stays_one(policy: str) -> None:
    from litgpt import GPT

    from tests.litgpt_checkpoints import small_config

    model = upcast.patch(GPT(small_config("pythia-14m")).eval(), policy=f"{policy}; kv_cache=float32")
    model.set_kv_cache(1, 16)
    with torch.inference_mode():
        want = model(torch.arange(1, 9)[None])
        got = model(torch.arange(1, 9)[None], torch.arange(8))
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.float32
    assert relative_error(got, want) < 1e-3


# --- classes ----------------------------------------------------------------------------------------------------------

Binary = Callable[[Tensor, Tensor], Any]


def iadd(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def isub(x: Tensor, y: Tensor) -> Tensor:
    x -= -y
    return x


# op class -> spellings that overflow for x = y = 60000 (shape 4 x 4)
SPELLINGS: dict[str, dict[str, Binary]] = {
    "residual": {
        "+": lambda x, y: x + y,
        "torch.add": torch.add,
        "alpha": lambda x, y: torch.add(x, y, alpha=2),
        "Tensor.add": lambda x, y: x.add(y),
        "add_": lambda x, y: x.clone().add_(y),
        "+=": lambda x, y: iadd(x.clone(), y),
        "-=": lambda x, y: isub(x.clone(), y),
        "-": lambda x, y: x - (-y),
        "sub": lambda x, y: torch.subtract(x, -y),
        "rsub": lambda x, y: torch.rsub(-x, y),
        "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones_like(x)),
        "lerp": lambda x, y: torch.lerp(-x, y, 2.0),
    },
    "scores": {
        "@": lambda x, y: x @ y.T,
        "matmul": lambda x, y: torch.matmul(x, y.mT),
        "bmm": lambda x, y: torch.bmm(x[None], y[None].mT),
        "baddbmm": lambda x, y: torch.baddbmm(x[None], x[None], y[None].mT),
        "einsum": lambda x, y: torch.einsum("ik,jk->ij", x, y),
        "tensordot": lambda x, y: torch.tensordot(x, y.T, dims=1),
    },
    "norm": {
        "**": lambda x, y: x**2,
        "pow": lambda x, y: torch.pow(x, 2),
        "square": lambda x, y: x.square(),
        "sum": lambda x, y: x.sum(-1),
        "norm": lambda x, y: torch.linalg.vector_norm(x.flatten()),
        "cumsum": lambda x, y: x.cumsum(-1),
    },
    "softmax": {
        "exp": lambda x, y: torch.exp(x / 5000),
        "expm1": lambda x, y: (x / 5000).expm1(),
        "mse_loss": lambda x, y: F.mse_loss(x, -y),
    },
    "activation": {
        "*": lambda x, y: x * y,
        "mul": torch.mul,
        "div": lambda x, y: x / (1 / y),
        "prelu": lambda x, y: F.prelu(-x, torch.full((1,), 2.0, dtype=x.dtype)),
    },
}


class Spelling(nn.Module):
    """One operation of two activations, and a weight that makes the module one to patch."""

    def __init__(self, function: Binary) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


@pytest.mark.parametrize(
    ("op_class", "spelling"), [(each, name) for each, spellings in SPELLINGS.items() for name in spellings]
)
def test_every_spelling_runs_in_float32_when_its_class_is_upcast(op_class: str, spelling: str) -> None:
    function = SPELLINGS[op_class][spelling]
    x = torch.full((4, 4), LARGE, dtype=torch.float16)
    want = function(x.float(), x.float())
    others = Policy(frozenset(CLASSES) - {op_class})
    for policy, finite in ((Policy(frozenset({op_class})), True), (Policy(frozenset()), False), (others, False)):
        model = run_under(Spelling(function), policy)
        got = model(x.clone(), x.clone())
        assert bool(got.isfinite().all()) is finite, policy
        if finite:
            assert got.dtype == torch.float32
            assert relative_error(got, want) < 2e-3  # some spellings halve a part of it on the way


class Classes(nn.Module):
    """One operation of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        y = torch.softmax(y @ y.mT, -1).view(-1)[:64].view(8, 8)
        return F.gelu(y) + y


ATEN = {
    "linear": "addmm",
    "norm": "native_layer_norm",
    "softmax": "_softmax",
    "scores": "mm",
    "residual": "add",
    "activation": "gelu",
}


class Dtypes(TorchDispatchMode):
    """Notes the dtype that each operation itself sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        self.seen.setdefault(func.overloadpacket.__name__, set()).update(dtypes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op_class", CLASSES)
def test_each_class_alone_changes_what_its_operation_sees_and_no_other(
    op_class: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcast.kernels._active", None)
    upcast.kernels.use("portable")
    x = torch.randn(8, 8, dtype=torch.float16)
    model = run_under(Classes(), Policy(frozenset({op_class})))
    with Dtypes() as dtypes, torch.no_grad():
        model(x)
    if op_class == "linear":  # a mode sees our own operator: float32, and the weight as it is stored
        assert dtypes.seen.pop("linear") == {torch.float32, torch.float16}
        dtypes.seen["addmm"] = {torch.float32}
    for other, name in ATEN.items():
        assert dtypes.seen[name] == {torch.float32 if other == op_class else torch.float16}, other


def test_overrides_hold_inside_the_modules_they_name() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(16) * 300)
    x = torch.full((1, 16), 10.0, dtype=torch.float16)
    outputs = []
    upcast.patch(model, policy="none; 1=linear; 2=linear")
    for layer in model:
        layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    got = model(x)
    assert got.dtype == torch.float32
    assert got[0, 0] == 10 * 300.0**3
    assert outputs[0][0, 0] == 3000


def test_the_model_s_code_sees_float16_and_its_own_float32_is_heeded() -> None:
    seen = []

    class Sniffing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            seen.extend([y.dtype, self.linear.weight.dtype, self.gain.dtype, y.float().dtype, y.T.dtype])
            return (y.float() * self.gain.float()).to(y.dtype)

    model = Sniffing()
    half = copy.deepcopy(model).half()
    x = torch.randn(8, 8, dtype=torch.float16)
    want = half(x)
    assert torch.equal(run_under(copy.deepcopy(model), Policy(frozenset()))(x), want)
    plain, seen[:] = list(seen), []
    run_under(model, Policy(frozenset({"linear"})))(x)
    assert seen == plain[:5] == [torch.float16, torch.float16, torch.float16, torch.float32, torch.float16]

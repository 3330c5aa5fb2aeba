"""Transformations of a patched model: torch.func, forward mode, tracers, modes; beside the unpatched model."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded
from upcast import kernels

WARNINGS = pytest.mark.filterwarnings(  # of torch's own
    *("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"),
    *(
        "ignore:Attempted to insert a get_attr",
        "ignore:There is a performance drop because",
        "ignore:torch.quantize_per",
        "ignore:The tensor attributes self._flat_weights",
    ),
)
pytestmark = WARNINGS
TOLERANCE = 1e-5
Function = Callable[..., Any]


class Attention(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x)[0]


class Bare(nn.Module):
    """Parameters without a layer: products of all kinds, experts, elementwise operations, one that upcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.experts = (nn.Parameter(torch.randn(*shape)) for shape in ((5, 6), (3, 6, 4)))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.addmm(self.bias, x, self.table).tanh()
        each = torch.einsum("bd,edf->bef", hidden, self.experts) + (hidden @ self.experts[0]).unsqueeze(1)
        return each * self.experts[0, 0] + torch.cumsum(self.table, 0)[0, :4]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.embed(ids).tanh())


MODELS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)), (4, 5)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)), (2, 3, 5, 5)),
    "attention": (Attention, (2, 3, 8)),
    "bare": (Bare, (2, 5)),
    "lstm": (lambda: Recurrent(5, 7, batch_first=True), (2, 3, 5)),
}


def two(name: str) -> tuple[Any, Any, Tensor]:
    """Return the unpatched model with rounded weights, the patched one, and an input."""
    make, shape = MODELS[name]
    plain = rounded(make().eval())
    return plain, upcast.patch(copy.deepcopy(plain)), torch.randn(*shape)


def seeded(x: Tensor, *more: int) -> Tensor:
    return torch.randn(*more, *x.shape, generator=torch.Generator().manual_seed(7))


def loss(model: Function) -> Function:
    return lambda x: model(x).square().sum()


def stacked(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x, -x])


# --- torch.func and autograd ------------------------------------------------------------------------------------------


def dual(model: Function, x: Tensor) -> Any:
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, seeded(x))))
        return torch.cat([primal, tangent])


def twice(model: Function, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(model)(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def batched(model: Function, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    y = model(x)
    return torch.autograd.grad(y, x, seeded(y, 3), is_grads_batched=True)[0]


def checkpointed(reentrant: bool) -> Function:
    def run(model: Function, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return x.grad

    return run


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module, x: Tensor) -> Any:
    """With respect to all parameters, weights included."""
    found = grad(lambda parameters: loss(lambda x: functional_call(model, parameters, (x,)))(x))(parameters_of(model))
    return torch.cat([found[name].flatten() for name in sorted(found)])


def per_sample(model: nn.Module, x: Tensor) -> Any:
    """With respect to the vectors, one gradient per sample."""
    vectors = {name: p for name, p in parameters_of(model).items() if p.dim() < 2}
    one = grad(lambda vectors, x: loss(lambda x: functional_call(model, vectors, (x,)))(x))
    found = vmap(one, in_dims=(None, 0))(vectors, stacked(x))
    return torch.cat([found[name].flatten() for name in sorted(found)] or [torch.ones(1)])


def ensemble(model: nn.Module, x: Tensor) -> Any:
    parameters, buffers = stack_module_state([model, copy.deepcopy(model)])  # type: ignore[arg-type]
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)


def jacobian(**settings: Any) -> Function:
    return lambda model, x: functional.jacobian(model, x, **settings)


SECOND_OR_FORWARD: dict[str, Function] = {  # torch's own attention on the CPU has these in its steps only
    "grad of grad": lambda model, x: grad(lambda x: grad(loss(model))(x).square().sum())(x),
    "create_graph": twice,
    "jvp": lambda model, x: torch.cat(jvp(model, (x,), (seeded(x),))),
    "jacfwd": lambda model, x: jacfwd(model)(x),
    "hessian": lambda model, x: hessian(loss(model))(x),
    "linearize": lambda model, x: linearize(model, x)[1](seeded(x)),
    "dual numbers": dual,
    "jacobian, forward": jacobian(vectorize=True, strategy="forward-mode"),
    "hessian, vectorized": lambda model, x: functional.hessian(loss(model), x, vectorize=True),
    "functional.jvp": lambda model, x: functional.jvp(model, x, seeded(x))[1],
}
FIRST: dict[str, Function] = {
    "vmap": lambda model, x: vmap(model)(stacked(x)),
    "vmap, other dimensions": lambda model, x: vmap(model, in_dims=1, out_dims=1)(stacked(x).movedim(0, 1)),
    "vmap of vmap": lambda model, x: vmap(vmap(model))(torch.stack([stacked(x), stacked(x)])),
    "vmap in chunks": lambda model, x: vmap(model, chunk_size=2)(stacked(x)),
    "grad": lambda model, x: grad(loss(model))(x),
    "vmap of grad": lambda model, x: vmap(grad(loss(model)))(stacked(x)),
    "vjp": lambda model, x: vjp(model, x)[1](model(x))[0],
    "jacrev": lambda model, x: jacrev(model)(x),
    "jacobian": jacobian(),
    "jacobian, vectorized": jacobian(vectorize=True),
    "is_grads_batched": batched,
    "checkpoint": checkpointed(False),
    "checkpoint, reentrant": checkpointed(True),
    "functional_call": lambda model, x: functional_call(model, dict(model.named_parameters()), (x,)),
    "gradients of parameters": gradients,
    "gradients per sample": per_sample,
    "stack_module_state": ensemble,
}
NOT_TORCH_ITSELF = {("lstm", name) for name in (*SECOND_OR_FORWARD, *FIRST) if "vmap" in name} | {
    ("lstm", name)
    for name in ("jvp", "jacfwd", "hessian", "linearize", "dual numbers", "jacobian, forward", "stack_module_state")
}  # torch's LSTM has no batches and no tangents; ours is made of operations that have
GRADED = [
    pytest.param(model, name, id=f"{model}-{name}")
    for model in MODELS
    for name in (*SECOND_OR_FORWARD, *FIRST)
    if (model, name) not in NOT_TORCH_ITSELF
]


@pytest.mark.parametrize(("kind", "name"), GRADED)
def test_torch_func_and_autograd(kind: str, name: str) -> None:
    plain, model, x = two(kind)
    stored = half_weights(model).keys()
    run = {**SECOND_OR_FORWARD, **FIRST}[name]
    steps = sdpa_kernel(SDPBackend.MATH) if name in SECOND_OR_FORWARD else contextlib.nullcontext()
    with steps:
        got, want = run(model, x), run(plain, x)
        assert got.shape == want.shape
        assert relative_error(got, want) < TOLERANCE
        if name.startswith(("vmap", "jvp", "dual")):
            with torch.no_grad():
                assert relative_error(run(model, x), want) < TOLERANCE
    assert half_weights(model).keys() == stored


def test_torch_s_own_lstm_has_no_batches_but_ours_has() -> None:
    plain, model, x = two("lstm")
    want = torch.stack([plain(each) for each in stacked(x)])
    assert relative_error(vmap(model)(stacked(x)), want) < TOLERANCE
    assert relative_error(jvp(model, (x,), (seeded(x),))[0], plain(x)) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Input #. requires gradient")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(5, 3), lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh())])
def test_gradcheck_finds_every_kind_of_derivative(layer: Function) -> None:
    model = upcast.patch(layer().eval().requires_grad_(False))
    x = torch.randn(2, 5).requires_grad_()
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(model, x, eps=1e-2, atol=1e-2, **checks)
    assert torch.autograd.gradgradcheck(lambda x: model(x).square(), x, eps=1e-2, atol=1e-2)
    assert_patched(model)


def test_under_torch_func_a_weight_stays_in_float16() -> None:
    """What is kept for the backward pass is float16, as without torch.func."""
    model = upcast.patch(nn.Linear(64, 64, bias=False).eval())
    seen: list[torch.dtype] = []
    original = kernels.linear

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(weight.dtype)
        return original(x, weight, bias)

    kernels.linear = note
    try:
        vmap(grad(loss(model)))(torch.randn(3, 2, 64))
    finally:
        kernels.linear = original
    assert set(seen) == {torch.float16}
    assert upcast.patching.engine.record_of(model).fallbacks.calls == {}


def test_the_second_gradient_of_fused_attention() -> None:
    q, k, v = (torch.randn(1, heads, 5, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: kernels.causal_attention(*x, 0.3), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: kernels.causal_attention(*x, 0.3), (q, k, v))


def test_gradients_in_batches_go_through_every_fused_step() -> None:
    cos, sin = torch.randn(4, 6), torch.randn(4, 6)
    steps: list[tuple[Function, Tensor]] = [
        (lambda x: kernels.rms_norm(x, torch.ones(7)), torch.randn(3, 7)),
        (lambda x: kernels.gated(x, x + 1, "silu"), torch.randn(3, 7)),
        (lambda x: kernels.rope(x, cos, sin), torch.randn(2, 3, 4, 6)),
        (lambda x: kernels.causal_attention(x, x[:, :2], x[:, 2:], 0.3), torch.randn(1, 4, 5, 6)),
    ]
    for step, x in steps:
        x.requires_grad_()
        directions = seeded(step(x), 2)
        want = [torch.autograd.grad(step(x), x, each)[0] for each in directions]
        for one_by_one in (False, True):
            got = torch.autograd.grad(step(x), x, directions, is_grads_batched=True, create_graph=one_by_one)[0]
            assert relative_error(got, torch.stack(want)) < TOLERANCE

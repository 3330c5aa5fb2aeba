"""Under torch.autocast a program sees the dtypes of the unpatched one, and numbers at least as good.

The unpatched model has the same weights, rounded where float16 stores them; what both are off is measured against it
without autocast.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import upcast
from tests.conftest import half_weights, relative_error, rounded
from tests.tensor.test_surroundings import FAMILIES, IDS, Product, pair, result

HALVES = [torch.bfloat16, torch.float16]
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(2))

# what is done to an input and a weight, the weight's shape, the input
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[int, ...], Tensor]] = {
    "linear": (F.linear, (6, 8), X),
    "linear with a bias": (lambda x, w: F.linear(x, w, torch.linspace(0, 1, 6)), (6, 8), X),
    "linear of bfloat16": (lambda x, w: F.linear(x.bfloat16(), w), (6, 8), X),
    "linear of half": (lambda x, w: F.linear(x.half(), w), (6, 8), X),
    "linear of a weight": (lambda x, w: F.linear(w, w), (6, 8), X),
    "transposed": (lambda x, w: F.linear(x, w.t()), (8, 6), X),
    "matmul": (torch.matmul, (8, 6), X),
    "from the left": (lambda x, w: w @ x[0], (6, 5), X),
    "weights": (lambda x, w: w @ w.t(), (8, 6), X),
    "with a vector": (lambda x, w: w @ x[0, 0], (6, 8), X),
    "mm": (lambda x, w: torch.mm(x[0], w), (8, 6), X),
    "mm with out": (lambda x, w: torch.mm(x[0].detach(), w, out=torch.empty(5, 6)), (8, 6), X),
    "mv": (lambda x, w: torch.mv(w, x[0, 0]), (6, 8), X),
    "bmm": (torch.bmm, (2, 8, 6), X),
    "addmm": (lambda x, w: torch.addmm(torch.ones(6), x[0], w), (8, 6), X),
    "addmm with factors": (lambda x, w: torch.addmm(torch.ones(6), x[0], w, beta=0.5, alpha=2), (8, 6), X),
    "addmm to a weight": (lambda x, w: torch.addmm(w, x[0], torch.ones(8, 6)), (5, 6), X),
    "addmv": (lambda x, w: torch.addmv(torch.ones(6), w, x[0, 0]), (6, 8), X),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.ones(2, 5, 6), x, w), (2, 8, 6), X),
    "conv1d": (F.conv1d, (6, 5, 3), X),
    "conv2d": (F.conv2d, (6, 4, 3, 3), IMAGE),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (6, 2, 3, 3), IMAGE),
    "conv_transpose2d": (F.conv_transpose2d, (4, 6, 3, 3), IMAGE),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x[None], w, w), (1, 2, 5, 8), X),
    "embedding": (lambda x, w: F.embedding(torch.tensor([1, 2]), w), (8, 6), X),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (3, 8, 8), X),
    "einsum": (lambda x, w: torch.einsum("bti,io->bto", x, w), (8, 6), X),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 1), (8, 6), X),
    "cdist": (lambda x, w: torch.cdist(x[0], w), (4, 8), X),
    "cat": (lambda x, w: torch.cat([w, w]), (5, 8), X),
    "cat with others": (lambda x, w: torch.cat([w, x[0]]), (5, 8), X),
    "cat with bfloat16": (lambda x, w: torch.cat([w, x[0].bfloat16()]), (5, 8), X),
    "stack": (lambda x, w: torch.stack([x[0], w]), (5, 8), X),
    "times": (torch.mul, (5, 8), X),
    "times bfloat16": (lambda x, w: w * x.bfloat16(), (5, 8), X),
    "index_copy": (lambda x, w: x[0].index_copy(0, torch.tensor([1, 3]), w[:2]), (5, 8), X),
    "softmax": (lambda x, w: (x + w).softmax(-1), (5, 8), X),
    "layer norm": (lambda x, w: F.layer_norm(x, (5, 8), w), (5, 8), X),
    "into a cache": (
        lambda x, w: torch.zeros(2, 9, 6, dtype=F.linear(x, w).dtype).index_copy(1, torch.arange(5), F.linear(x, w)),
        (6, 8),
        X,
    ),
}


def relative(got: Any, want: Any) -> float:
    return relative_error(got.float(), want.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: str, grad: bool, dtype: torch.dtype) -> None:
    function, shape, x = OPERATIONS[operation]
    model = Product(function, *shape)
    plain = rounded(model).requires_grad_(False)
    upcast.patch(model)
    exact = model(x)  # in float32, of inputs in half too
    inputs = [x.clone().requires_grad_(grad) for _ in range(2)]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        want, got = plain(inputs[0]), model(inputs[1])
    assert got.dtype == want.dtype
    assert got.requires_grad == want.requires_grad
    assert relative(got, exact) < max(1.3 * relative(want, exact), 1e-6)
    if want.requires_grad:
        for output, leaf in zip((want, got), inputs, strict=True):
            output.float().square().sum().backward()
            assert leaf.grad is not None
            assert leaf.grad.dtype == torch.float32
        assert relative(inputs[1].grad, inputs[0].grad) < 2e-2
    assert half_weights(model)


def seen(model: nn.Module, inputs: Tensor) -> list[tuple[str, list[torch.dtype]]]:
    """Return the dtypes that every module of a model gives."""
    found: list[tuple[str, list[torch.dtype]]] = []

    def look(name: str) -> Any:
        return lambda module, args, out: found.append(
            (name, [leaf.dtype for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)])
        )

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


def skip_what_torch_lacks(run: Callable[[], Any]) -> None:
    """Skip where torch itself has no LSTM in bfloat16: on processors without AVX-512."""
    try:
        run()
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):
            raise
        pytest.skip("torch has no LSTM in bfloat16 on this processor")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"padded"}))  # of which torch's own way fails under autocast
def test_models(family: str, grad: bool, dtype: torch.dtype) -> None:
    plain, model, inputs = pair(family)
    with torch.set_grad_enabled(grad):
        exact = result(plain, inputs)
        with torch.autocast("cpu", dtype):
            if family == "recurrent" and dtype == torch.float16:
                pytest.skip("torch has no LSTM in float16 on the CPU")
            skip_what_torch_lacks(lambda: result(plain, inputs))
            want, got = result(plain, inputs), result(model, inputs)
            assert seen(model, inputs) == seen(plain, inputs)
    assert got.dtype == want.dtype
    assert relative(got, exact) < 1.3 * relative(want, exact)
    again = result(model, inputs)
    assert again.dtype == torch.float32
    assert relative_error(again, exact) < 1e-5


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "LSTM": (lambda: nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True), (X,)),
    "projected": (lambda: nn.LSTM(8, 16, proj_size=4), (X,)),
    "GRU": (lambda: nn.GRU(8, 16), (X,)),
    "RNN": (lambda: nn.RNN(8, 16), (X,)),
    "LSTM cell": (lambda: nn.LSTMCell(8, 16), (X[0],)),
    "GRU cell": (lambda: nn.GRUCell(8, 16), (X[0],)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (X, X, X)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).train(), (X,)),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), (X, X)),
    "bilinear": (lambda: nn.Bilinear(8, 8, 4), (X, X)),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("layer", LAYERS)
def test_torchs_own_layers(layer: str, grad: bool) -> None:
    make, inputs = LAYERS[layer]
    model = make()
    plain = rounded(model)
    upcast.patch(model, trainable=()).requires_grad_(False)
    assert half_weights(model)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        skip_what_torch_lacks(lambda: plain(*inputs))
        want, got = (pytree.tree_leaves(each(*inputs)) for each in (plain, model))
    assert [each.dtype for each in got] == [each.dtype for each in want]
    assert all(relative(one, two) < 2e-2 for one, two in zip(got, want, strict=True))


def by_switches(enabled: bool = True) -> AbstractContextManager[Any]:
    class Switched:
        def __enter__(self) -> None:
            self.before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            torch.set_autocast_enabled("cpu", enabled)
            torch.set_autocast_dtype("cpu", torch.bfloat16)

        def __exit__(self, *_: object) -> None:
            torch.set_autocast_enabled("cpu", self.before[0])
            torch.set_autocast_dtype("cpu", self.before[1])

    return Switched()


def nested(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        with torch.autocast("cpu", enabled=False):
            second = model(x)
        with torch.autocast("cpu", torch.float16):
            third = model(x)
        return [first, second, third, model(x)]


def decorated(model: nn.Module, x: Tensor) -> list[Tensor]:
    @torch.autocast("cpu", torch.bfloat16)
    def call() -> Tensor:
        found: Tensor = model(x)
        return found

    return [call(), model(x)]


def switched(model: nn.Module, x: Tensor) -> list[Tensor]:
    with by_switches():
        return [model(x)]


def for_another_device(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.autocast("meta", torch.bfloat16) if torch.amp.is_autocast_available("meta") else nullcontext():
        return [model(x)]


FORMS = {"nested": nested, "decorated": decorated, "switched": switched, "another device": for_another_device}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_every_form_of_autocast(form: str, grad: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    plain = rounded(model).requires_grad_(False)  # torch keeps its casts of what requires grad, whatever the dtype
    upcast.patch(model)
    with torch.set_grad_enabled(grad):
        want, got = FORMS[form](plain, X), FORMS[form](model, X)
    assert [each.dtype for each in got] == [each.dtype for each in want]
    assert all(relative(one, two) < 2e-2 for one, two in zip(got, want, strict=True))


class Adapted(nn.Module):
    """A frozen base with a low-rank adapter that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_training_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Adapted()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain.base.weight.copy_(plain.base.weight.half().float())
    upcast.patch(model, trainable=["down.*", "up.*"])
    assert list(half_weights(model)) == ["base.weight"]
    losses = []
    for each in (plain, model):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1)
        kept = []
        for _ in range(5):
            with torch.autocast("cpu", dtype):
                loss = F.mse_loss(each(X).float(), X)
            optimizer.zero_grad()
            loss.backward()
            assert each.down.weight.grad.dtype == torch.float32
            optimizer.step()
            kept.append(loss.detach())
        losses.append(torch.stack(kept))
    assert losses[1][-1] < losses[1][0]
    assert relative_error(losses[1], losses[0]) < 1e-2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", ["greedy", "beams", "no cache", "one cache for both"])
@pytest.mark.parametrize("kind", ["grouped heads", "sliding windows", "sinks", "latent", "encoder and decoder"])
def test_generation(kind: str, way: str, dtype: torch.dtype) -> None:
    from tests.integrations.transformers.test_cache import generated, layers, lively

    options: dict[str, Any] = {"beams": {"num_beams": 2}, "no cache": {"use_cache": False}}.get(way, {})
    model = lively(kind, "eager" if kind == "sinks" else "sdpa")
    plain = rounded(model)
    upcast.patch(model)
    found = []
    exact, _ = generated(plain, **{**options, "max_new_tokens": 3, "min_new_tokens": 3})
    for each in (plain, model):
        if way == "one cache for both" and kind != "encoder and decoder":
            cache = pytest.importorskip("transformers").DynamicCache(config=each.config)
            with torch.no_grad():
                each(torch.arange(3, 17).view(2, 7)[:, :3], past_key_values=cache)
            options = {"past_key_values": cache}
        with torch.autocast("cpu", dtype):
            found.append(generated(each, **{**options, "max_new_tokens": 3, "min_new_tokens": 3}))
    (want, before), (got, after) = found
    assert got.dtype == want.dtype
    allowed = max(3e-2, 1.1 * relative(want, exact))  # in bfloat16 the unpatched one chooses other experts
    assert min(relative(got, want), relative(got, exact)) < allowed
    if after is not None:
        kinds = [[(type(layer).__name__, layer.keys.dtype, layer.values.dtype) for layer in layers(c)]
                 for c in (before, after)]  # fmt: skip
        assert kinds[0] == kinds[1]


def test_litgpt() -> None:
    from tests.fused_models import small_config

    litgpt = pytest.importorskip("litgpt")
    model = litgpt.GPT(small_config("Llama-3.2-1B")).eval()
    plain = rounded(model)
    upcast.patch(model)
    outputs = []
    for each in (plain, model):
        with torch.inference_mode():
            each.set_kv_cache(1, 16)
            with torch.autocast("cpu", torch.bfloat16):
                out = [each(IDS[:1], torch.arange(7)), each(IDS[:1, :1], torch.tensor([7]))]
            cache = each.transformer.h[0].attn.kv_cache
            outputs.append((out, cache.k.dtype, cache.v.dtype))
    (want, *kinds), (got, *ours) = outputs
    assert kinds == ours
    assert [each.dtype for each in got] == [each.dtype for each in want]
    assert all(relative(one, two) < 3e-2 for one, two in zip(got, want, strict=True))


def test_compiled() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    plain = rounded(model)
    upcast.patch(model)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = plain(X), compiled(X)
    assert got.dtype == want.dtype
    assert relative(got, want) < 2e-2
    with torch.no_grad():
        assert compiled(X).dtype == torch.float32


@pytest.mark.parametrize("policy", ["none", "norm", "linear", "scores", "sensitive"])
def test_other_policies_work_or_say_why_not(policy: str) -> None:
    """Both choose dtypes; what torch cannot mix is named, with the remedy."""
    make, inputs = FAMILIES["Llama"]
    plain = make().eval()
    model = upcast.patch(copy.deepcopy(plain), policy=policy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        if policy in ("scores", "sensitive"):
            with pytest.raises(upcast.UpcastError, match=f"policy {policy} inside torch.autocast.*policy='safe'"):
                model(inputs)
        else:
            assert relative_error(result(model, inputs), result(plain, inputs)) < 2e-2

"""Modes, dtypes and kinds of tensors around a patched model: what they give equals the unpatched model's, dtypes too.

The unpatched model has the same weights, rounded where float16 stores them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import upcast
from tests.conftest import half_weights, relative_error, rounded

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
IDS = torch.arange(3, 17).view(2, 7)
TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(64, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.lstm(self.embed(ids))[0])


class Padded(nn.Module):
    """Of which torch drops the padded positions on the way, and gives zeros for them: a mean over all has those."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.encoder = nn.Embedding(64, 16), nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))

    def forward(self, ids: Tensor) -> Any:
        padding = torch.arange(ids.shape[1]) > torch.tensor([[3], [5]])
        return self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1)


def transformer(kind: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("transformers")
        model: nn.Module = getattr(library, kind)(getattr(library, config)(**{**TEXT, **sizes}))
        return model

    return make


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.ConvTranspose2d(8, 4, 3))


PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Llama": (transformer("LlamaForCausalLM", "LlamaConfig"), IDS),
    "GPT-2": (transformer("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2), IDS),
    "experts": (
        transformer("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
        IDS,
    ),
    "BERT": (transformer("BertModel", "BertConfig"), IDS),
    "ViT": (transformer("ViTModel", "ViTConfig", image_size=16, patch_size=8), PIXELS),
    "convolutional": (convolutional, PIXELS),
    "recurrent": (Recurrent, IDS),
    "padded": (Padded, IDS),
}


def pair(family: str) -> tuple[Any, Any, Tensor]:
    """Return the rounded model, the patched one, and what to call them with."""
    make, inputs = FAMILIES[family]
    model = make().eval()
    plain = rounded(model)
    upcast.patch(model)
    assert half_weights(model)
    return plain, model, inputs


def result(model: Any, inputs: Tensor) -> Tensor:
    output = model(inputs)
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


# --- modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def setting(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


def switch(change: Callable[[Any], Any], value: Any, back: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: setting(change, value, back)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients": nullcontext,
    "default dtype bfloat16": switch(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default dtype float64": switch(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": switch(torch.set_default_device, "cpu", None),
    "device": lambda: torch.device("cpu"),
    "deterministic": switch(torch.use_deterministic_algorithms, True, False),
    "flushed denormals": switch(torch.set_flush_denormal, True, False),
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention in plain steps": lambda: sdpa_kernel(SDPBackend.MATH),
    "saved tensors": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:TF32 acceleration")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_modes(family: str, mode: str) -> None:
    plain, model, inputs = pair(family)
    with MODES[mode]():
        want, got = result(plain, inputs), result(model, inputs)
    assert got.dtype == want.dtype
    assert relative_error(got, want) < 2e-3 if "bfloat16" in mode else relative_error(got, want) < 1e-5
    assert half_weights(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_may_change_between_calls(family: str) -> None:
    plain, model, inputs = pair(family)
    before = torch.get_num_threads()
    with torch.no_grad():
        want = result(plain, inputs)
        for threads in (2, 1, 2):
            with setting(torch.set_num_threads, threads, before):
                assert relative_error(result(model, inputs), want) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_mode_and_then_gradients(family: str) -> None:
    plain, model, inputs = pair(family)
    with torch.inference_mode():
        result(model, inputs)
        born = inputs.clone()  # an inference tensor
    with torch.no_grad():
        assert relative_error(result(model, born), result(plain, born)) < 1e-5
    model.requires_grad_(False)
    plain.requires_grad_(False)
    grads = []
    for each in (plain, model):
        vector = next(p for p in each.parameters() if p.dim() == 1).requires_grad_()
        out = result(each, inputs)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        grads.append(vector.grad)
    assert relative_error(grads[1], grads[0]) < 1e-4


# --- the default dtype ------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "zeros_like": lambda m: torch.zeros_like(m.weight),
    "ones_like": lambda m: torch.ones_like(m.weight),
    "full_like": lambda m: torch.full_like(m.weight, 2.0),
    "empty_like": lambda m: torch.empty_like(m.weight).zero_(),
    "new_zeros": lambda m: m.weight.new_zeros(3),
    "new_tensor": lambda m: m.weight.new_tensor([1.0, 2.0]),
    "new_full": lambda m: m.weight.new_full((2,), 3.0),
    "to": lambda m: torch.ones(2, dtype=torch.float64).to(m.weight),
    "type_as": lambda m: torch.ones(2, dtype=torch.float64).type_as(m.weight),
    "weight.to": lambda m: m.weight.to(torch.float32),
    "float": lambda m: m.weight.float(),
    "double": lambda m: m.weight.double(),
    "weight.type_as": lambda m: m.weight.type_as(torch.ones(2, dtype=torch.float64)),
    "cpu": lambda m: m.cpu().weight,
    "module.float": lambda m: m.float().weight,
    "module.to": lambda m: m.to(torch.float32).weight,
    "clone": lambda m: m.weight.clone(),
    "index": lambda m: m.weight[torch.tensor([1, 2])],
    "sum": lambda m: m.weight.sum(),
    "times": lambda m: m.weight * 2,
    "matmul": lambda m: torch.ones(2, 8, dtype=torch.float32) @ m.weight,
    "embedding": lambda m: F.embedding(torch.tensor([1]), m.weight),
    "promoted": lambda m: torch.tensor(torch.result_type(m.weight, torch.ones(2, dtype=torch.float16)).itemsize),
    "deepcopy": lambda m: copy.deepcopy(m).weight,
    "state": lambda m: m.state_dict()["weight"].float(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_default_dtype_changes_no_weight(question: str, dtype: torch.dtype) -> None:
    model = nn.Linear(8, 8)
    plain = rounded(model)
    upcast.patch(model)
    with setting(torch.set_default_dtype, dtype, torch.float32), torch.no_grad():
        want, got = QUESTIONS[question](plain), QUESTIONS[question](model)
    assert got.dtype == want.dtype
    assert torch.equal(got, want) if question != "matmul" else relative_error(got, want) < 1e-6


@pytest.mark.parametrize("kernels", ["native", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_under_another_default_dtype(family: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcast.kernels._active", None)
    make, inputs = FAMILIES[family]
    model = make().eval()
    plain = rounded(model)
    with setting(torch.set_default_dtype, torch.float16, torch.float32), torch.no_grad():
        upcast.kernels.use(kernels)
        upcast.patch(model)
        assert half_weights(model)
        result(model, inputs)  # what it keeps for later is of the right dtype too
    with torch.no_grad():
        assert relative_error(result(model, inputs), result(plain, inputs)) < 1e-5


# --- inputs of other dtypes and layouts -------------------------------------------------------------------------------


class Product(nn.Module):
    """One operation on an input and a weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def attends(x: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, w, w)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(8, 8), X),
    "linear without module": (lambda: Product(F.linear, 6, 8), X),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3), X),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), PIXELS),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 4, 3), PIXELS),
    "embedding": (lambda: nn.Embedding(10, 8), X.abs()),
    "bag": (lambda: nn.EmbeddingBag(10, 8), X[0].abs()),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), X),
    "RMS norm": (lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), X),
    "LSTM": (lambda: nn.LSTM(8, 8), X),
    "GRU": (lambda: nn.GRU(8, 8), X),
    "cell": (lambda: nn.GRUCell(8, 8), X[0]),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), X),
    "matmul": (lambda: Product(torch.matmul, 8, 6), X),
    "matmul from the left": (lambda: Product(lambda x, w: w @ x, 6, 5), X),
    "mm": (lambda: Product(torch.mm, 8, 6), X[0]),
    "bmm": (lambda: Product(torch.bmm, 2, 8, 6), X),
    "addmm": (lambda: Product(lambda x, w: torch.addmm(torch.zeros(6), x, w), 8, 6), X[0]),
    "baddbmm": (lambda: Product(lambda x, w: torch.baddbmm(torch.zeros(6), x, w), 2, 8, 6), X),
    "einsum": (lambda: Product(lambda x, w: torch.einsum("bti,io->bto", x, w), 8, 6), X),
    "tensordot": (lambda: Product(lambda x, w: torch.tensordot(x, w, 1), 8, 6), X),
    "cdist": (lambda: Product(torch.cdist, 4, 8), X[0]),
    "bilinear": (lambda: Product(lambda x, w: F.bilinear(x, x, w), 3, 8, 8), X),
    "times": (lambda: Product(torch.mul, 5, 8), X),
    "plus": (lambda: Product(torch.add, 5, 8), X),
    "attention": (lambda: Product(attends, 2, 5, 8), X),
    "one bias for all": (lambda: Product(lambda x, w: F.linear(x, w, torch.ones(1)), 6, 8), X),
}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x,
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "float64": Tensor.double,
    "complex": Tensor.cfloat,
    "integers": Tensor.long,
    "small integers": Tensor.int,
    "truth": Tensor.bool,
    "coordinates": Tensor.to_sparse,
    "compressed rows": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "oneDNN": lambda x: x.to_mkldnn(),  # type: ignore[operator]
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1][:3]], layout=torch.jagged),
    "to be negated": torch._neg_view,
    "an imaginary part": lambda x: torch.complex(x, x + 1).conj().imag,
    "a feature less": lambda x: x[..., :-1],
    "no dimension": lambda x: x.sum(),
    "no rows": lambda x: x[:0],
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}
LENIENT = {"half", "bfloat16"}  # such inputs count as float32, where torch refuses them


def outcome(model: nn.Module, x: Tensor) -> Any:
    """Return the first result, or the exception."""
    try:
        found = model(x)
    except Exception as error:
        return error
    return found[0] if isinstance(found, tuple) else found


def dense(x: Tensor) -> Tensor:
    if x.is_nested:
        return torch.cat([part.reshape(-1) for part in x.unbind()])
    x = x.to_dense() if x.layout != torch.strided else x
    return torch.view_as_real(x) if x.is_complex() else x


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR", "ignore:Sparse invariant")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_give_what_they_give_without_a_patch(layer: str, kind: str) -> None:
    make, x = LAYERS[layer]
    if (layer, kind) == ("encoder layer", "nested"):
        pytest.skip("torch's own fast path alone takes them, and it asks for ordinary weights")
    try:
        x = INPUTS[kind](x)
    except Exception:
        pytest.skip("torch makes no such tensor of this shape")
    model = make().eval()
    plain = rounded(model)
    upcast.patch(model)
    for mode in (torch.no_grad, nullcontext):
        with mode():
            want, got = outcome(plain, x), outcome(model, x)
        if isinstance(want, Exception):
            if kind in LENIENT and isinstance(got, Tensor):
                assert got.dtype == torch.float32
                continue
            assert isinstance(got, (type(want), RuntimeError, AssertionError)), got
            assert not isinstance(got, upcast.UpcastError)
            assert "kernels" not in str(got)
            continue
        assert isinstance(got, Tensor), got
        assert (got.dtype, got.layout, got.is_nested) == (want.dtype, want.layout, want.is_nested)
        assert relative_error(dense(got), dense(want)) < 1e-5 or not want.numel()
    assert half_weights(model)


KEYWORDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda w, x: F.linear(input=x, weight=w), (6, 8)),
    "matmul": (lambda w, x: torch.matmul(other=w, input=x), (8, 6)),
    "mm": (lambda w, x: torch.mm(input=x[0], mat2=w), (8, 6)),
    "bmm": (lambda w, x: torch.bmm(mat2=w, input=x), (2, 8, 6)),
    "addmm": (lambda w, x: torch.addmm(input=torch.zeros(6), mat1=x[0], mat2=w), (8, 6)),
    "mul": (lambda w, x: torch.mul(input=w, other=x), (5, 8)),
    "sub": (lambda w, x: torch.sub(x, other=w), (5, 8)),
    "method": (lambda w, x: w.add(other=x), (5, 8)),
    "select": (lambda w, x: torch.index_select(input=w, dim=0, index=torch.tensor([1])), (5, 8)),
    "transpose": (lambda w, x: torch.transpose(input=w, dim0=0, dim1=1) @ x[0], (5, 8)),
    "cat": (lambda w, x: torch.cat(tensors=[w, x[0]], dim=0), (5, 8)),
    "embedding": (lambda w, x: F.embedding(input=torch.tensor([1]), weight=w), (5, 8)),
    "reshape": (lambda w, x: torch.reshape(input=w, shape=(8, 5)) @ x[0], (5, 8)),
    "sum": (lambda w, x: torch.sum(input=w, dim=0), (5, 8)),
    "where": (lambda w, x: torch.where(condition=x > 0, input=x, other=w), (5, 8)),
}


@pytest.mark.parametrize("call", KEYWORDS)
def test_arguments_may_be_named(call: str) -> None:
    function, shape = KEYWORDS[call]
    model = Product(lambda x, w: function(w, x), *shape)
    plain = rounded(model)
    upcast.patch(model)
    assert half_weights(model)
    assert relative_error(model(X), plain(X)) < 1e-5


def test_results_go_where_out_says() -> None:
    model = Product(lambda x, w: torch.mm(x, w, out=made), 8, 6)
    plain = rounded(model)
    upcast.patch(model)
    for dtype, error in ((torch.float32, None), (torch.float16, RuntimeError)):
        made = torch.empty(5, 6, dtype=dtype)
        with torch.no_grad(), pytest.raises(error) if error else ExitStack():
            want = plain(X[0]).clone()
            assert model(X[0]) is made
            assert relative_error(made, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "experts", "BERT"])
def test_embeddings_in_half(family: str, dtype: torch.dtype) -> None:
    """Which torch refuses in a float32 model; here the layers compute in float32."""
    plain, model, ids = pair(family)
    with torch.no_grad():
        rows = plain.get_input_embeddings()(ids).to(dtype)
        want, got = plain(inputs_embeds=rows.float())[0], model(inputs_embeds=rows)[0]
    assert got.dtype == torch.float32
    assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("which", ["cos", "sin", "mask"])
def test_angles_and_masks_in_half(which: str) -> None:
    plain, model, _ = pair("Llama")
    outputs = []
    for each in (plain, model):
        layer, rotary = each.model.layers[0], each.model.rotary_emb
        hidden = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
        angles = dict(zip(("cos", "sin"), rotary(hidden, torch.arange(7).unsqueeze(0)), strict=True))
        mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -1e4)
        if which != "mask":
            angles[which] = angles[which].half()
        with torch.no_grad():
            outputs.append(layer(hidden, attention_mask=mask, position_embeddings=tuple(angles.values())))
    assert outputs[1].dtype == outputs[0].dtype
    assert relative_error(outputs[1], outputs[0]) < 1e-3

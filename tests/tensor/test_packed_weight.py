"""PackedWeight: a weight stored in 12 bits is bit for bit the checkpoint's, and an ordinary float32 parameter."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import upcast
from tests.conftest import relative_error
from upcast.tensor.half_weight import HalfWeight
from upcast.tensor.packed_weight import LENT, MOST_ESCAPES, PackedWeight

ODD = [0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), 65504.0, 2.0**-133]


class Net(nn.Module):
    """A table, tied to the head; a layer with numbers that few tensors have; experts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 189)
        self.up, self.down = nn.Linear(189, 250), nn.Linear(250, 189, bias=False)
        self.head = nn.Linear(189, 50, bias=False)
        self.head.weight = self.table.weight
        self.experts = nn.Parameter(torch.randn(3, 189, 190) / 8)

    def forward(self, ids: Tensor) -> Any:
        x = self.table(ids)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x) + (x @ self.experts[1]).mean()


def net() -> tuple[Net, Net]:
    """Return (bfloat16 model, the same in float32)."""
    model = Net().to(torch.bfloat16).eval()
    return model, copy.deepcopy(model).float()


IDS = torch.tensor([[3, 1, 4], [1, 5, 49]])


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    return {name: each for name, each in model.named_parameters() if isinstance(each, PackedWeight)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.bfloat16).contiguous().view(torch.int16)


@pytest.mark.parametrize("storage", ["packed", "auto"])
def test_a_model_is_packed_and_computes_as_in_float32(storage: str, each_kernels: str) -> None:
    model, plain = net()
    before = {name: bits(each) for name, each in model.named_parameters()}
    upcast.patch(model, storage=storage)
    found = packed_weights(model)
    assert {"up.weight", "down.weight", "experts"} <= found.keys()
    assert model.head.weight is model.table.weight
    assert all(torch.equal(bits(each), before[name]) for name, each in model.named_parameters())
    with torch.no_grad():
        assert relative_error(model(IDS), plain(IDS)) < 1e-6
    assert f"storage={storage}" in upcast.report(model)
    upcast.unpatch(model)
    assert all(each.dtype == torch.bfloat16 for each in model.parameters())
    assert all(torch.equal(bits(each), before[name]) for name, each in model.named_parameters())


@pytest.mark.parametrize(
    "shape", [(1, 2), (2, 63), (3, 64), (5, 65), (7, 129), (4, 130, 3), (2, 3, 70), (3, 190)], ids=str
)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_number_is_kept_bit_for_bit(shape: tuple[int, ...], data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight = torch.randn(shape, generator=generator).bfloat16()
    places = st.tuples(st.integers(0, weight.numel() - 1), st.sampled_from(ODD))
    for place, value in data.draw(st.lists(places, max_size=4)):
        weight.view(-1)[place] = value
    module = nn.Module().eval()
    module.register_parameter("weight", nn.Parameter(weight.clone()))
    with upcast.core.messages.silent():
        upcast.patch(module, storage="packed")
        kept = module.state_dict()["weight"]
        if isinstance(module.weight, PackedWeight):
            assert torch.equal(bits(module.weight.float()), bits(weight))
            assert torch.equal(kept.view(torch.int16), weight.view(torch.int16))
            assert module.weight.store.matrix is not None
            assert module.weight.store.matrix.nbytes < 2 * weight.numel()
        else:  # so small, or so odd, that 16 bits are fewer, or 32 where float16 does not hold it
            assert kept.dtype in (torch.float16, torch.float32)


def test_what_float16_cannot_hold_is_packed() -> None:
    model = nn.Linear(640, 64).to(torch.bfloat16).eval()
    with torch.no_grad():
        model.weight[3, 5] = 1e30
    plain = copy.deepcopy(model).float()
    upcast.patch(model, storage="packed")
    assert isinstance(model.weight, PackedWeight)
    x = torch.randn(2, 640)
    assert relative_error(model(x), plain(x)) < 1e-6


# what is asked for, the weight -> the class that stores it, and what the plan says of it
ODDLY = torch.randn(64, 640).bfloat16()
ODDLY.view(-1)[::100] = torch.logspace(-30, 30, 410).bfloat16()  # a hundredth: more than "auto" takes
CHOICES: list[tuple[str, Tensor, type, str]] = [
    ("packed", torch.randn(64, 640).bfloat16(), PackedWeight, "bits a number"),
    ("packed", torch.randn(64, 640).bfloat16().float(), PackedWeight, "bits a number"),
    ("packed", torch.randn(64, 640), HalfWeight, "bfloat16 does not have its numbers"),
    ("packed", torch.randn(640, 64).bfloat16().t(), HalfWeight, "its memory is not contiguous"),
    ("packed", torch.randn(64, 3).bfloat16(), HalfWeight, "16 bits are fewer"),
    ("packed", ODDLY, PackedWeight, "escapes"),
    ("auto", ODDLY.clamp(-1e4, 1e4), HalfWeight, "% escapes"),
    ("auto", torch.randn(64, 640).bfloat16(), PackedWeight, "bits a number"),
    ("float16", torch.randn(64, 640).bfloat16(), HalfWeight, "a weight"),
    ("float32", torch.randn(64, 640).bfloat16(), nn.Parameter, "matches keep pattern"),
]


@pytest.mark.parametrize(("storage", "weight", "kind", "why"), CHOICES)
def test_the_plan_says_how_each_weight_is_stored(storage: str, weight: Tensor, kind: type, why: str) -> None:
    module = nn.Module().eval()
    module.register_parameter("weight", nn.Parameter(weight))
    planned = upcast.plan(module, storage=storage).changes[0]
    upcast.patch(module, storage=storage)
    done = upcast.patching.engine.record_of(module).plan.changes[0]
    assert type(module.weight) is kind
    assert why in planned.reason
    assert (planned.action, planned.bytes_after) == (done.action, done.bytes_after)
    if kind is PackedWeight:
        assert done.bytes_after == module.weight.nbytes < 2 * weight.numel()


def test_weights_of_few_escapes_take_12_bits() -> None:
    model = nn.Linear(576, 1536).to(torch.bfloat16).eval()
    nn.init.normal_(model.weight, std=0.03)
    upcast.patch(model, storage="auto")
    matrix = model.weight.store.matrix
    assert matrix is not None
    assert matrix.escapes < MOST_ESCAPES * model.weight.numel()
    assert matrix.nbytes < 0.377 * 4 * model.weight.numel()


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda w: w.t(),
    "a row": lambda w: w[3],
    "rows": lambda w: w[2:5],
    "columns": lambda w: w[:, 3:9],
    "chunk": lambda w: w.chunk(2)[1],
    "reshaped": lambda w: w.reshape(189, 250),
    "a copied reshape": lambda w: w.t().reshape(-1),
    "sum": lambda w: w.sum(),
    "twice": lambda w: w * 2,
    "chosen": lambda w: w[torch.tensor([1, 2])],
    "joined": lambda w: torch.cat([w, w]),
    "double": lambda w: w.double(),
    "half": lambda w: w.half(),
    "cloned": lambda w: w.clone(),
    "detached": lambda w: w.detach(),
    "times": lambda w: torch.ones(2, 189) @ w.t(),
    "from the left": lambda w: torch.ones(2, 250) @ w,
    "some rows": lambda w: torch.ones(2, 189) @ w[5:9].t(),
    "some columns": lambda w: torch.ones(2, 5) @ w[:, :5].t(),
    "norm": lambda w: w.norm(),
}


@pytest.mark.parametrize("way", WAYS)
def test_to_everyone_who_looks_it_is_float32(way: str) -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    got, want = WAYS[way](model.up.weight), WAYS[way](plain.up.weight)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert relative_error(got.float(), want.float()) < 1e-6
    assert isinstance(model.up.weight, PackedWeight)


def test_gradients_flow_through() -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    x = [torch.randn(2, 189, requires_grad=True)]
    x.append(x[0].detach().clone().requires_grad_())
    for each, given_x in zip((model, plain), x, strict=True):
        each.down(each.up(given_x)).square().sum().backward()
    assert relative_error(x[0].grad, x[1].grad) < 1e-6


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copying", [copy.deepcopy, _pickled, _saved])
def test_copies_stay_packed_and_tied(copying: Callable[[nn.Module], Any]) -> None:
    model, _ = net()
    upcast.patch(model, storage="packed")
    other = copying(model)
    assert packed_weights(other).keys() == packed_weights(model).keys()
    assert other.head.weight is other.table.weight
    with torch.no_grad():
        assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_are_bfloat16_and_go_both_ways(assign: bool) -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    state = model.state_dict()
    assert {value.dtype for name, value in state.items() if value.dim() > 1} == {torch.bfloat16}
    assert state["head.weight"] is state["table.weight"]  # or files would hold it twice
    nn.init.ones_(plain.up.weight)
    model.load_state_dict(plain.state_dict(), assign=assign)
    assert isinstance(model.up.weight, PackedWeight)
    with torch.no_grad():
        assert relative_error(model(IDS), plain(IDS)) < 1e-6


def test_what_is_written_into_a_state_dict_arrives() -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    with torch.no_grad():
        state = model.state_dict()
        for each in (state, plain.state_dict()):
            each["up.weight"].mul_(2)
        assert relative_error(model(IDS), plain(IDS)) < 1e-6
        weight = state["up.weight"]
        del state
        for one in (weight, plain.up.weight):
            one.mul_(0.5)
        del weight, one, each
        assert relative_error(model(IDS), plain(IDS)) < 1e-6
    assert isinstance(model.up.weight, PackedWeight)
    gc.collect()
    assert not LENT  # nobody can write any more, and no copy is kept


def test_a_state_dict_that_is_held_follows_the_weights() -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    with torch.no_grad():
        states = [each.state_dict() for each in (model, plain)]
        for each in (model, plain):
            each.up.weight.mul_(2)
        again = model.state_dict()["up.weight"]
        for found in (states[0]["up.weight"], again):
            assert torch.equal(found.float(), states[1]["up.weight"])
        for state in states:  # a table, which no layer's short way asks for
            state["table.weight"].mul_(2)
        assert torch.equal(model.table(IDS), plain.table(IDS))
        part = states[0]["up.weight"][:1]
        del states, state, again, found
        part.zero_()
        plain.up.weight[:1].zero_()
        assert relative_error(model.up(model.table(IDS)), plain.up(plain.table(IDS))) < 1e-6


WRITES: dict[str, tuple[Callable[[Tensor], Any], bool]] = {  # what is written -> whether it can be packed
    "zeros": (lambda w: w.zero_(), True),
    "a row": (lambda w: w[0].fill_(2), True),
    "doubled": (lambda w: w.mul_(2), True),
    "through a view": (lambda w: w.t()[1].zero_(), True),
    "a third": (lambda w: w.div_(3), False),
    "assigned": (lambda w: setattr(w, "data", torch.ones(250, 189)), True),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_arrives(write: str) -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    function, stays = WRITES[write]
    view = model.up.weight[:2]
    with torch.no_grad():
        for each in (model, plain):
            function(each.up.weight)
        assert torch.equal(model.up.weight.detach().clone(), plain.up.weight)
        assert relative_error(model(IDS), plain(IDS)) < 1e-6
        if write != "assigned":
            assert torch.equal(view.float().clone(), plain.up.weight[:2])
    assert isinstance(model.up.weight, PackedWeight) == stays or write == "assigned"


def test_compiled_it_stays_packed() -> None:
    torch.compiler.reset()
    model, plain = net()
    upcast.patch(model, storage="packed")
    compiled = torch.compile(model.up, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 189, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert relative_error(y, plain.up(x)) < 1e-6
    assert relative_error(x.grad, torch.ones(3, 250) @ plain.up.weight) < 1e-6
    assert isinstance(model.up.weight, PackedWeight)


def test_torch_func_goes_through() -> None:
    model, plain = net()
    upcast.patch(model, storage="packed")
    x = torch.randn(4, 189)
    for transform in (torch.func.jacrev, torch.func.vmap):
        got, want = (transform(each.up)(x) for each in (model, plain))
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("storage", ["bits", "16", ""])
def test_an_unknown_storage_is_refused(storage: str) -> None:
    for call in (upcast.patch, upcast.plan):
        with pytest.raises(upcast.UpcastError, match="it must be one of float16, packed, auto, float32"):
            call(nn.Linear(3, 3).eval(), storage=storage)  # type: ignore[operator]


@pytest.mark.parametrize("policy", ["none", "sensitive"])
def test_other_policies_select_from_packed_weights(policy: str) -> None:
    torch.manual_seed(0)
    model, plain = net()
    with torch.no_grad():
        wanted = upcast.patch(copy.deepcopy(model), policy=policy)(IDS)
        found = upcast.patch(model, policy=policy, storage="packed")(IDS)
    assert packed_weights(model)
    assert relative_error(found, plain(IDS)) < 2 * relative_error(wanted, plain(IDS)) + 1e-6


@pytest.mark.parametrize("storage", ["float32", "packed"])
def test_a_loaded_checkpoint_keeps_every_bit(storage: str, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=192, intermediate_size=256, num_hidden_layers=1)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, 3] = -3.5316e-06  # float16 would move it
    model.save_pretrained(tmp_path)
    loaded = upcast.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, storage=storage)
    assert bool(packed_weights(loaded)) == (storage == "packed")
    want = dict(model.named_parameters())
    assert all(torch.equal(bits(each.float()), bits(want[name])) for name, each in loaded.named_parameters())

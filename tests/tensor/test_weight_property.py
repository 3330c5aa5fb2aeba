"""Whatever a program does to a weight, the patched model and a plain float32 one stay equal, number by number.

Random sequences of ordinary operations. Where the patched model stores float16, the plain one is rounded after every
write. Aliases (views, state dicts, numpy arrays) and copies that were taken on the way are kept, written into, and
compared too.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, relative_error, rounded
from upcast.tensor.half_weight import HalfWeight

WIDTH, WORDS = 4, 6
VALUES = (0.5, -1.25, 0.3, 2.0, 1e5)
NAMES = ("words.weight", "first.weight", "second.weight", "mix.weight", "head.weight", "scale")
IDS = torch.tensor([[0, 3, 5], [1, 1, 4]])


class Small(nn.Module):
    """One of each: an embedding, equal linears, a convolution, a head as large as the embedding, a bare weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.scale = nn.Parameter(torch.rand(1, WIDTH))
        self.second.weight.data.copy_(self.first.weight.data)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) * self.scale
        x = x + self.second(torch.tanh(self.first(x)))
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)  # type: ignore[no-any-return]


# --- what is done, to either model alike ------------------------------------------------------------------------------


def _share(m: nn.Module, name: str) -> Tensor:
    weight = m.get_parameter(name)
    weight.data = data = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
    return data


def _assign_local(m: nn.Module, name: str, v: float) -> nn.Module:
    merged = m.get_parameter(name).data.clone()
    merged += v
    m.get_parameter(name).data = merged
    merged *= 0.5
    return m


# tensors that are the weight's memory
ALIASES: dict[str, Callable[[nn.Module, str], Any]] = {
    "itself": lambda m, name: m.get_parameter(name),
    ".data": lambda m, name: m.get_parameter(name).data,
    "detach": lambda m, name: m.get_parameter(name).detach(),
    "state_dict": lambda m, name: m.state_dict(keep_vars=True)[name],
    "view": lambda m, name: m.get_parameter(name).data.view(-1),
    "rows": lambda m, name: m.get_parameter(name).detach()[1:3],
    "one row": lambda m, name: m.get_parameter(name).data[0],
    "columns": lambda m, name: m.get_parameter(name).data[:, 1:3],
    "transposed": lambda m, name: m.get_parameter(name).detach().transpose(0, 1),
    "narrow of a view": lambda m, name: m.get_parameter(name).data.flatten()[2:].narrow(0, 0, 2),
    "expanded": lambda m, name: m.get_parameter(name).detach().unsqueeze(0),
    "chunk": lambda m, name: m.get_parameter(name).detach().chunk(2, dim=1)[1],
    "diagonal": lambda m, name: m.get_parameter(name).data.flatten(1).diagonal(),
    "contiguous": lambda m, name: m.get_parameter(name).detach().contiguous(),
    "float": lambda m, name: m.get_parameter(name).detach().float(),
    "cpu": lambda m, name: m.get_parameter(name).data.cpu(),
    "numpy": lambda m, name: torch.from_numpy(m.get_parameter(name).detach().numpy()),
    "numpy rows": lambda m, name: torch.from_numpy(m.get_parameter(name).data[1:].numpy()),
    "dlpack": lambda m, name: torch.from_dlpack(m.get_parameter(name).detach()),
    "assigned": _share,
}

# tensors of their own
COPIES: dict[str, Callable[[nn.Module, str], Any]] = {
    "clone": lambda m, name: m.get_parameter(name).detach().clone(),
    "deepcopy": lambda m, name: copy.deepcopy(m.get_parameter(name)),
    "sum": lambda m, name: (m.get_parameter(name) + 1).detach(),
    "times one": lambda m, name: (1 * m.get_parameter(name)).detach(),
    "indexed": lambda m, name: m.get_parameter(name).detach()[torch.tensor([0, 0])],
    "double": lambda m, name: m.get_parameter(name).detach().double(),
    "half": lambda m, name: m.get_parameter(name).detach().half(),
    "contiguous of transposed": lambda m, name: m.get_parameter(name).detach().transpose(0, 1).contiguous().clone(),
    "zeros_like": lambda m, name: torch.zeros_like(m.get_parameter(name)).detach(),
    "new_tensor": lambda m, name: m.get_parameter(name).new_ones(2, 2),
    "a parameter": lambda m, name: nn.Parameter(m.get_parameter(name).clone()),
    "stacked": lambda m, name: torch.stack([m.get_parameter(name), m.get_parameter(name)]).detach(),
    "saved": lambda m, name: _through_torch_save(m.get_parameter(name)),
    "saved view": lambda m, name: _through_torch_save(m.get_parameter(name).data[1:]),
    "pickled": lambda m, name: pickle.loads(pickle.dumps(m.get_parameter(name).detach())),
    "safetensors": lambda m, name: _through_safetensors(m.get_parameter(name)),
    "numpy copy": lambda m, name: torch.from_numpy(numpy.array(m.get_parameter(name).detach().numpy())),
    "tolist": lambda m, name: torch.tensor(m.get_parameter(name).tolist()),
}

# writes into a tensor; ``v`` is a number
WRITES: dict[str, Callable[[Tensor, float], Any]] = {
    "fill_": lambda t, v: t.fill_(v),
    "mul_": lambda t, v: t.mul_(v),
    "add_": lambda t, v: t.add_(v),
    "add_ itself": lambda t, v: t.add_(t, alpha=v),
    "copy_": lambda t, v: t.copy_(torch.linspace(-v, v, t.numel()).view(t.shape)),
    "copy_ of doubles": lambda t, v: t.copy_(torch.full(t.shape, v, dtype=torch.float64)),
    "row": lambda t, v: t.__setitem__(0, v),
    "last": lambda t, v: t.__setitem__((..., -1), v),
    "mask": lambda t, v: t.__setitem__(t > 0, v),
    "rows by index": lambda t, v: t.__setitem__(torch.tensor([0, 0]), v),
    "index_fill_": lambda t, v: t.index_fill_(0, torch.tensor([0]), v),
    "index_add_": lambda t, v: t.index_add_(0, torch.tensor([0]), torch.full_like(t[:1], v)),
    "masked_fill_": lambda t, v: t.masked_fill_(t < 0, v),
    "clamp_": lambda t, v: t.clamp_(-abs(v), abs(v)),
    "neg_": lambda t, v: t.neg_(),
    "zero_ a view": lambda t, v: t[:1].zero_(),
    "a view of a view": lambda t, v: t.flatten()[1:].view(-1)[:1].mul_(v) if t.is_contiguous() else t.mul_(v),
    "lerp_": lambda t, v: t.lerp_(torch.full_like(t, v), 0.25),
    "addcmul_": lambda t, v: t.addcmul_(torch.full_like(t, v), torch.full_like(t, 0.5)),
    "+=": lambda t, v: t.__iadd__(v),
    "normal_": lambda t, v: nn.init.normal_(t, std=abs(v)),
    "uniform_": lambda t, v: t.uniform_(-abs(v), abs(v)),
    "out=": lambda t, v: torch.mul(t.clone(), v, out=t),
    "foreach": lambda t, v: torch._foreach_mul_([t], v),
    "swapped rows": lambda t, v: t.copy_(t.flip(0)),
    "numpy": lambda t, v: t.detach().numpy().__setitem__(0, v),
}

# what a program does to the model; it returns the model to go on with
SURGERY: dict[str, Callable[[Any, str, float], Any]] = {
    "exchange layers": lambda m, name, v: _exchange(m),
    "exchange weights": lambda m, name, v: _exchange_weights(m),
    "exchange numbers": lambda m, name, v: _exchange_numbers(m),
    "tie": lambda m, name, v: _tie(m),
    "untie": lambda m, name, v: _untie(m),
    "data of the other": lambda m, name, v: _assign_data(m, "first.weight", m.second.weight.data),
    "data of new numbers": lambda m, name, v: _assign_data(m, name, torch.full(m.get_parameter(name).shape, v)),
    "data of a sum": lambda m, name, v: _assign_data(m, name, m.get_parameter(name).data + v),
    "data of a local variable": _assign_local,
    "data transposed": lambda m, name, v: _assign_data(m, "first.weight", m.first.weight.data.t()),
    "a new parameter": lambda m, name, v: _set(m, name, nn.Parameter(m.get_parameter(name).detach() * v)),
    "load its state": lambda m, name, v: _load(m, m.state_dict()),
    "load half its state": lambda m, name, v: _load(m, {key: 0.5 * t for key, t in m.state_dict().items()}),
    "load what was saved": lambda m, name, v: _load(m, _through_torch_save(m.state_dict())),
    "load safetensors": lambda m, name, v: _load(m, _safetensors_state(m)),
    "deepcopy": lambda m, name, v: copy.deepcopy(m),
    "pickle": lambda m, name, v: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m, name, v: _through_torch_save(m, weights_only=False),
    "to float32": lambda m, name, v: m.float().cpu().to(torch.float32),
    "freeze": lambda m, name, v: m.requires_grad_(False),
    "thaw one": lambda m, name, v: (m.get_parameter(name).requires_grad_(True), m)[1],
    "vector": lambda m, name, v: _through_a_vector(m, v),
    "apply": lambda m, name, v: m.apply(_shrink),
    "one step": lambda m, name, v: _step(m, [m.get_parameter(name).requires_grad_(True)]),
    "steps of all": lambda m, name, v: _step(m.requires_grad_(True), list(m.parameters())),
    "share_memory": lambda m, name, v: m.share_memory(),
}


def _through_torch_save(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def _through_safetensors(weight: Tensor) -> Tensor:
    return safetensors.torch.load(safetensors.torch.save({"w": weight.detach()}))["w"]


def _safetensors_state(model: nn.Module) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save({k: t.clone() for k, t in model.state_dict().items()}))


def _exchange(m: Any) -> Any:
    m.first.weight, m.second.weight = m.second.weight, m.first.weight
    return m


def _exchange_weights(m: Any) -> Any:
    m.first.weight.data, m.second.weight.data = m.second.weight.data, m.first.weight.data
    return m


def _exchange_numbers(m: Any) -> Any:
    kept = m.first.weight.detach().clone()
    m.first.weight.data.copy_(m.second.weight)
    m.second.weight.data[:] = kept
    return m


def _tie(m: Any) -> Any:
    m.head.weight = m.words.weight
    return m


def _untie(m: Any) -> Any:
    m.head.weight = nn.Parameter(m.words.weight.detach().clone())
    return m


def _set(m: nn.Module, name: str, value: nn.Parameter) -> nn.Module:
    owner, _, attribute = name.rpartition(".")
    setattr(m.get_submodule(owner), attribute, value)
    return m


def _assign_data(m: nn.Module, name: str, data: Tensor) -> nn.Module:
    m.get_parameter(name).data = data
    return m


def _load(m: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    m.load_state_dict(state)
    return m


def _through_a_vector(m: nn.Module, v: float) -> nn.Module:
    vector = nn.utils.parameters_to_vector(m.parameters())
    nn.utils.vector_to_parameters(v * vector.detach(), m.parameters())
    return m


def _shrink(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.weight.mul_(0.5)


def _step(m: nn.Module, parameters: list[Any]) -> nn.Module:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    if max(float(p.detach().abs().nan_to_num(1e9).max()) for p in m.parameters()) > 100:
        return m  # then float32's own last digits decide
    m.zero_grad()  # of weights that did not learn before, the patched model has no gradient
    with torch.enable_grad():
        m(IDS).sum().backward()
    optimizer.step()
    return m


# --- both models, and what was taken from them ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
class Weights(RuleBasedStateMachine):
    """Steps in any order; after each, everything is compared."""

    @initialize(seed=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.float16]))
    def start(self, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        self.patched, self.steps = Small().to(dtype), 0
        self.plain = rounded(self.patched).float()
        upcast.patch(self.patched)
        assert_patched(self.patched)
        self.held: list[tuple[str, Any, Any]] = []

    @rule(kind=st.sampled_from(sorted(ALIASES)), name=st.sampled_from(NAMES))
    def take_an_alias(self, kind: str, name: str) -> None:
        self._hold(f"{kind} of {name}", ALIASES[kind], name)

    @rule(kind=st.sampled_from(sorted(COPIES)), name=st.sampled_from(NAMES))
    def take_a_copy(self, kind: str, name: str) -> None:
        taken = self._hold(f"{kind} of {name}", COPIES[kind], name)
        assert taken is not None
        assert kind == "deepcopy" or not isinstance(taken[0], HalfWeight), "a copy is an ordinary tensor"

    @rule(kind=st.sampled_from(sorted(WRITES)), number=st.integers(0, 20), v=st.sampled_from(VALUES))
    def write(self, kind: str, number: int, v: float) -> None:
        """Into one of the weights or of what was taken."""
        targets: list[tuple[Any, Any]] = [
            (self.patched.get_parameter(name), self.plain.get_parameter(name)) for name in NAMES
        ]
        targets += [(got, want) for _, got, want in self.held]
        self._both(targets[-1 - number % len(targets)], lambda t: WRITES[kind](t, v))

    @rule(kind=st.sampled_from(sorted(SURGERY)), name=st.sampled_from(NAMES), v=st.sampled_from([0.5, 1.0, -1.25]))
    def operate(self, kind: str, name: str, v: float) -> None:
        if kind == "share_memory":  # which moves the numbers: what others made of the old memory is lost, in any model
            self.held = [each for each in self.held if not each[0].startswith(("dlpack", "numpy", "asarray"))]
        models = self._both((self.patched, self.plain), lambda m: SURGERY[kind](m, name, v))
        if models is not None:
            self.patched, self.plain = models

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "plain"):
            return
        self._round()
        for name, want in self.plain.named_parameters():
            got = self.patched.get_parameter(name)
            assert got.dtype == want.dtype
            _check(name, got, want)
        for what, got, want in self.held:
            _check(what, got, want)
        with torch.no_grad():
            got, want = self.patched(IDS), self.plain(IDS)
        if bool(want.isfinite().all()) and float(want.abs().max()) < 1e20:
            assert relative_error(got, want) < 1e-4, "outputs"

    def _hold(self, what: str, take: Callable[[nn.Module, str], Any], name: str) -> tuple[Any, Any] | None:
        taken = self._both((self.patched, self.plain), lambda m: take(m, name))
        if taken is not None:
            self.held.append((what, *taken))
        return taken

    def _both(self, pair: tuple[Any, Any], act: Callable[[Any], Any]) -> tuple[Any, Any] | None:
        """Do the same to both; what plain torch refuses, the patched model must refuse too."""
        results: list[Any] = []
        errors: list[Exception | None] = []
        for each in (pair[1], pair[0]):
            torch.manual_seed(0)
            try:
                with torch.no_grad():
                    results.append(act(each))
                errors.append(None)
            except Exception as error:
                results.append(None)
                errors.append(error)
                if len(errors) == 2 and errors[0] is None:
                    raise
        if errors[0] is not None:
            assert errors[1] is not None, f"plain torch refuses: {errors[0]}"
            return None
        return results[1], results[0]

    def _round(self) -> None:
        """Round the plain weights where the patched model stores float16."""
        with torch.no_grad():
            for name, want in self.plain.named_parameters():
                if _in_float16(self.patched.get_parameter(name)):
                    want.copy_(want.half().float())
            for _, got, want in self.held:  # a view may outlive its parameter
                if _in_float16(got):
                    want.copy_(want.half().float())


def _in_float16(weight: Tensor) -> bool:
    return type(weight) is HalfWeight and weight.reclaim()


def _check(what: str, got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    got, want = got.detach().double().clone(), want.detach().double()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6, equal_nan=True), f"{what}: {got} instead of {want}"


Weights.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a failure tells its steps; finding fewer takes minutes
    suppress_health_check=list(HealthCheck),
)
TestWeights = Weights.TestCase

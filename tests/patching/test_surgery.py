"""Surgery after the patch: what people do to the parts of a model works as on the unpatched, rounded one.

Each row does something to a model, patched and not, and both must compute the same afterwards.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

import upcast
from tests.conftest import assert_patched, relative_error, rounded
from upcast.tensor.half_weight import HalfWeight

Surgery = Callable[[Any], object]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.conv, self.batch = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.batch(self.conv(self.embedding(ids).mT)).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(12).view(2, 6)


def seeded(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float() * 0.3


def pair(**options: Any) -> tuple[Any, Any]:
    """Return (rounded float32 model, patched model)."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.batch.running_mean.normal_()
    plain = rounded(model)
    return plain, upcast.patch(model, **options)


def same(plain: Any, patched: Any, limit: float = 1e-5) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert relative_error(patched(IDS), plain(IDS)) < limit


class Half(nn.Module):
    """A parametrization: half of the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        return (found[0] * 0.5, *found[1:]) if isinstance(found, tuple) else found * 0.5


def deleted(model: Any) -> None:
    weight = model.head.weight
    del model.head.weight
    model.head.weight = weight * 0.5  # a plain attribute


def renamed(model: Any) -> None:
    layer = model.head
    layer.register_parameter("kernel", layer.weight)
    del layer.weight
    layer.forward = lambda x: F.linear(x, layer.kernel) + 1


def weight_normed(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model.head)


def old_spectral(model: Any) -> None:
    torch.manual_seed(5)  # with vectors along which the weight is not next to nothing: it is divided by that
    torch.nn.utils.spectral_norm(model.head).eval()


def new_spectral(model: Any) -> None:
    torch.manual_seed(0)
    parametrizations.spectral_norm(model.head).eval()


def new_module(model: Any) -> None:
    model.head = nn.Linear(16, 7)
    with torch.no_grad():
        model.head.weight.copy_(seeded((7, 16)))
        model.head.bias.zero_()


def inserted(model: Any) -> None:
    model.blocks.insert(1, copy.deepcopy(model.blocks[0]))


def removed(model: Any) -> None:
    del model.blocks[0]


def swapped(model: Any) -> None:
    a, b = model.blocks
    a.up.weight, b.up.weight = b.up.weight, a.up.weight


def exchanged_data(model: Any) -> None:
    a, b = model.blocks
    kept = a.up.weight.data.clone()
    a.up.weight.data = b.up.weight.data
    b.up.weight.data = kept


def initialised(model: Any) -> None:
    def init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.constant_(module.weight, 0.125)

    model.apply(init)


def initialised_at_random(model: Any) -> None:
    torch.manual_seed(7)
    nn.init.xavier_uniform_(model.head.weight)
    with torch.no_grad():  # what float16 stores of it
        model.head.weight.copy_(model.head.weight.half().float())


def resized(model: Any) -> None:
    model.head.weight.data = seeded((50, 16))
    model.head.out_features = 50


def tied(model: Any) -> None:
    model.head.weight = model.embedding.weight


def hook_on_root(model: Any) -> None:
    model.register_forward_hook(lambda module, args, output: output * 2)


def hook_inside(model: Any) -> None:
    model.blocks[0].up.register_forward_hook(lambda module, args, output: output * 2)


def buffers(model: Any) -> None:
    model.register_parameter("scale", nn.Parameter(torch.full((1,), 0.25)))
    before = model.head.forward
    model.head.forward = lambda x: before(x) * model.scale


def assigned(model: Any) -> None:
    torch.manual_seed(5)
    model.load_state_dict(rounded(Net()).state_dict(), assign=True)


def copied(model: Any) -> None:
    torch.manual_seed(5)
    model.load_state_dict(rounded(Net()).state_dict())


def parameters_replaced(model: Any) -> None:
    """Another dictionary, as DeepSpeed gives."""
    model.head._parameters = {"weight": nn.Parameter(seeded((40, 16))), "bias": None}


def gone_bias(model: Any) -> None:
    model.blocks[0].up.bias = None


def new_bias(model: Any) -> None:
    model.head.bias = nn.Parameter(torch.full((40,), 0.5))


def fused_conv(model: Any) -> None:
    model.conv = fusion.fuse_conv_bn_eval(model.conv, model.batch)
    model.batch = nn.Identity()


SURGERY: dict[str, Surgery] = {
    "prune random": lambda m: prune.custom_from_mask(m.head, "weight", seeded((40, 16)) > 0),
    "prune l1": lambda m: prune.l1_unstructured(m.head, "weight", 0.5),
    "prune structured": lambda m: prune.ln_structured(m.blocks[0].up, "weight", 0.5, n=2, dim=0),
    "prune globally": lambda m: prune.global_unstructured(
        [(m.head, "weight"), (m.blocks[0].up, "weight")], prune.L1Unstructured, amount=0.4
    ),
    "prune and remove": lambda m: prune.remove(prune.l1_unstructured(m.head, "weight", 0.5), "weight"),
    "prune convolution": lambda m: prune.l1_unstructured(m.conv, "weight", 0.5),
    "parametrize": lambda m: parametrize.register_parametrization(m.head, "weight", Half()),
    "parametrize embedding": lambda m: parametrize.register_parametrization(m.embedding, "weight", Half()),
    "parametrize and remove": lambda m: (
        parametrize.register_parametrization(m.head, "weight", Half()),
        parametrize.remove_parametrizations(m.head, "weight"),
    ),
    "parametrize and keep": lambda m: (
        parametrize.register_parametrization(m.head, "weight", Half()),
        parametrize.remove_parametrizations(m.head, "weight", leave_parametrized=False),
    ),
    "weight_norm": weight_normed,
    "weight_norm and remove": lambda m: (weight_normed(m), torch.nn.utils.remove_weight_norm(m.head)),
    "new weight_norm": lambda m: parametrizations.weight_norm(m.head),
    "spectral_norm": old_spectral,
    "new spectral_norm": new_spectral,
    "orthogonal": lambda m: parametrizations.orthogonal(m.head, orthogonal_map="householder"),
    "delete the weight": deleted,
    "rename the weight": renamed,
    "a new layer": new_module,
    "insert a layer": inserted,
    "remove a layer": removed,
    "swap weights": swapped,
    "swap weights' data": exchanged_data,
    "swap modules": lambda m: setattr(m, "blocks", nn.ModuleList([m.blocks[1], m.blocks[0]])),
    "apply an initialisation": initialised,
    "a random initialisation": initialised_at_random,
    "data of another shape": resized,
    "tie": tied,
    "a wrapper around a layer": lambda m: setattr(m, "head", Wrapper(m.head)),
    "a wrapper around a block": lambda m: m.blocks.__setitem__(0, Wrapper(m.blocks[0])),
    "a hook on the model": hook_on_root,
    "a hook inside": hook_inside,
    "a new parameter": buffers,
    "assign a state dict": assigned,
    "load a state dict": copied,
    "another dictionary of parameters": parameters_replaced,
    "take the bias away": gone_bias,
    "add a bias": new_bias,
    "fuse a batch norm": fused_conv,
    "a shallow copy": lambda m: setattr(m, "head", copy.copy(m.head)),
    "a deep copy": lambda m: setattr(m, "head", copy.deepcopy(m.head)),
    "a new weight": lambda m: setattr(m.head, "weight", nn.Parameter(seeded((40, 16)))),
    "a weight in place": lambda m: m.head.weight.data.mul_(0.5),
    "delete a module": lambda m: (m.blocks.__delitem__(1), m.blocks.append(nn.Identity())),
}

CONVERSIONS: dict[str, Surgery] = {
    "half": lambda part: part.half(),
    "bfloat16": lambda part: part.to(torch.bfloat16),
    "double": lambda part: part.double(),
    "float": lambda part: part.float(),
    "meta": lambda part: part.to("meta"),
    "empty": lambda part: part.to_empty(device="meta"),
    "shared": lambda part: part.share_memory(),
    "type": lambda part: part.type(torch.float64),
}
PARTS: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda m: m.head,
    "a block": lambda m: m.blocks[0],
    "a list": lambda m: m.blocks,
    "an embedding": lambda m: m.embedding,
    "a convolution": lambda m: m.conv,
    "a container of parts": lambda m: nn.Sequential(nn.BatchNorm1d(3), *m.children()),
    "a module around it": lambda m: nn.Sequential(nn.BatchNorm1d(3), m),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_converted_as_on_the_unpatched_model(part: str, conversion: str) -> None:
    plain, patched = pair()
    found = []
    for model in (plain, patched):
        inside = PARTS[part](model)
        CONVERSIONS[conversion](inside)
        found.append(inside)
        found.append(model)
    for one, other in ((found[0], found[2]), (found[1], found[3])):
        pairs = list(zip(one.state_dict(keep_vars=True).items(), other.state_dict(keep_vars=True).items(), strict=True))
        for (key, want), (name, got) in pairs:
            assert (key, want.dtype, want.shape, want.device) == (name, got.dtype, got.shape, got.device)
            if not want.is_meta:
                assert torch.equal(got.detach().double(), want.detach().double())


@pytest.mark.parametrize("name", SURGERY)
def test_surgery_is_as_on_the_unpatched_model(name: str) -> None:
    plain, patched = pair()
    assert_patched(patched)
    same(plain, patched)
    for model in (plain, patched):
        SURGERY[name](model)
    same(plain, patched)
    assert sum(isinstance(p, HalfWeight) for p in patched.parameters()) >= 2, "nothing of it is patched any more"


@pytest.mark.parametrize("name", SURGERY)
def test_afterwards_it_reports_saves_copies_and_is_unpatched(name: str) -> None:
    plain, patched = pair()
    for model in (plain, patched):
        SURGERY[name](model)
    assert "policy" in upcast.report(patched)
    assert list(patched.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in patched.named_parameters()] == [key for key, _ in plain.named_parameters()]
    if name not in ("weight_norm", "rename the weight", "a new parameter"):  # torch cannot copy it; it is a closure
        same(plain, copy.deepcopy(patched))
    upcast.unpatch(patched)
    same(plain, patched)
    assert not any(isinstance(p, HalfWeight) for p in patched.parameters())


@pytest.mark.parametrize("name", [each for each in SURGERY if each not in ("rename the weight", "a new parameter")])
def test_state_dicts_go_both_ways(name: str) -> None:
    plain, patched = pair()
    for model in (plain, patched):
        SURGERY[name](model)
    state = {key: value * 0.5 if value.is_floating_point() else value for key, value in plain.state_dict().items()}
    for model in (plain, patched):
        model.load_state_dict(state)
    same(plain, patched)
    for model in (plain, patched):
        model.load_state_dict({key: value.clone() for key, value in patched.state_dict().items()})
    same(plain, patched)

"""A model that was patched for inference and then trained learns as the unpatched one does, and says so in one line."""

import copy
import pickle
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import upcast
from tests.conftest import assert_patched, half_weights, relative_error, rounded

IDS = torch.arange(60).view(4, 15) % 31


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(31, 16), nn.LayerNorm(16)
        self.conv, self.body = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)
        self.head = nn.Linear(16, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        x = x + torch.tanh(self.conv(x.mT).mT)
        return self.head(torch.relu(self.body(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def plain_loop(model: nn.Module) -> list[float]:
    return fit(model, adam(model.parameters()))


def loop_in_training_mode(model: nn.Module) -> list[float]:
    return fit(model.train(), adam(model.parameters()))


def training_mode_then_optimizer_of_what_requires_grad(model: nn.Module) -> list[float]:
    model.train()
    loss_of(model).backward()
    return fit(model, adam(p for p in model.parameters() if p.requires_grad))


def head_on_a_frozen_body(model: nn.Module) -> list[float]:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return fit(model.train(), adam(model.parameters()))


def body_frozen_one_by_one(model: nn.Module) -> list[float]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("head")
    return fit(model, adam(p for p in model.parameters() if p.requires_grad))


def unfrozen_later(model: nn.Module) -> list[float]:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    first = fit(model, adam(model.head.parameters()))
    model.body.weight.requires_grad = True
    return first + fit(model, adam(p for p in model.parameters() if p.requires_grad))


def added_to_an_optimizer(model: nn.Module) -> list[float]:
    model.embed.requires_grad_(False)
    model.body.requires_grad_(False)
    optimizer = adam(model.head.parameters())
    optimizer.add_param_group({"params": list(model.conv.parameters())})
    return fit(model, optimizer)


def groups_with_decay(model: nn.Module) -> list[float]:
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return fit(model, torch.optim.AdamW(groups, lr=0.01))


def by_hand(model: nn.Module) -> list[float]:
    model.train()
    return steps_by_hand(model)


def steps_by_hand(model: nn.Module) -> list[float]:
    losses = []
    for _ in range(5):
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.1 * parameter.grad)
        losses.append(float(loss.detach()))
    return losses


def asked_for_by_hand(model: nn.Module) -> list[float]:
    """In evaluation mode, without an optimizer; that it learns was said of what required grad already."""
    return steps_by_hand(model.requires_grad_(True))


def some_asked_for_by_hand(model: nn.Module) -> list[float]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("head", "body"))
    return steps_by_hand(model)


def a_copy_asked_for_by_hand(model: nn.Module) -> list[float]:
    """A trained copy in the place of a layer, as PEFT's LN tuning has it."""
    head = copy.deepcopy(model.head)
    model.requires_grad_(False)
    model.head = head
    head.requires_grad_(True)
    return steps_by_hand(model)


def penalty_first(model: nn.Module) -> list[float]:
    """What is computed of the weights before the first forward pass, beside a product outside of any module."""
    model.train()
    losses = []
    for _ in range(4):
        model.zero_grad()
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        turned = model.head.bias.new_ones(1, 16) @ model.body.weight.T
        loss = loss_of(model) + 0.01 * penalty + 0.01 * turned.square().sum()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        losses.append(float(loss.detach()))
    return losses


def part_by_part(model: nn.Module) -> list[float]:
    """A loop that calls the parts of a model, some of them in eval mode, and never the model."""
    model.train()
    model.body.eval()
    losses = []
    for _ in range(4):
        model.zero_grad()
        x = model.norm(model.embed(IDS[:, :-1]))
        x = model.head(torch.relu(model.body(x + torch.tanh(model.conv(x.mT).mT))))
        loss = nn.functional.cross_entropy(x.flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        losses.append(float(loss.detach()))
    return losses


def scheduler_and_ema(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    losses = []
    for _ in range(4):
        losses += fit(model, optimizer, 1)
        schedule.step()
        average.update_parameters(model)
    return [*losses, float(loss_of(average).detach())]


def hooks_on_gradients(model: nn.Module) -> list[float]:
    norms: list[float] = []
    model.head.weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    model.body.weight.retain_grad()
    model.conv.weight.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    for factor in (3.0, 1.0):
        model.zero_grad()
        (factor * loss_of(model)).backward()
    return sorted([*norms, float(model.body.weight.grad.norm())], reverse=True)


def in_another_process(model: nn.Module) -> list[float]:
    """Hogwild: a child trains what is shared, and the parent sees it."""
    losses = [float(loss_of(model).detach())]
    model.share_memory()
    child = torch.multiprocessing.get_context("fork").Process(target=_train_alone, args=(model,))
    child.start()
    child.join()
    return [*losses, float(loss_of(model).detach())]


def _train_alone(model: nn.Module) -> None:
    torch.set_num_threads(1)
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)


Program = Callable[[nn.Module], list[float]]
PROGRAMS: list[Program] = [
    *(plain_loop, loop_in_training_mode, training_mode_then_optimizer_of_what_requires_grad, head_on_a_frozen_body),
    *(body_frozen_one_by_one, unfrozen_later, added_to_an_optimizer, groups_with_decay, by_hand, scheduler_and_ema),
    *(hooks_on_gradients, in_another_process, penalty_first, part_by_part),
    *(asked_for_by_hand, some_asked_for_by_hand, a_copy_asked_for_by_hand),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_learns_as_unpatched(
    program: Callable[[nn.Module], list[float]], capsys: pytest.CaptureFixture[str]
) -> None:
    got, want = upcast.patch(net()), rounded(net())
    capsys.readouterr()
    losses, wanted = program(got), program(want)
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert wanted[-1] < wanted[0]
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 2, said  # one for each reason
    for name, parameter in got.named_parameters():
        assert relative_error(parameter, want.get_parameter(name)) < 1e-4, name
        assert parameter.requires_grad is want.get_parameter(name).requires_grad, name


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_nobody_holds_the_model_but_its_own_train(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = copied(upcast.patch(net())).train()
    loss_of(model).backward()
    assert not half_weights(model)
    assert all(parameter.grad is not None for parameter in model.parameters())


ONE_LINE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": lambda layer: upcast.patch(layer).train(),
    "eval, train": lambda layer: upcast.patch(layer).eval().train(),
    "a copy": lambda layer: copy.deepcopy(upcast.patch(layer)).train(),
    "pickled": lambda layer: pickle.loads(pickle.dumps(upcast.patch(layer))).train(),
}


@pytest.mark.parametrize("line", ONE_LINE)
def test_a_layer_by_itself_begins_to_train(line: str) -> None:
    layer = ONE_LINE[line](nn.Linear(5, 3, bias=False))
    assert layer.training
    layer(torch.ones(2, 5)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 5), 2.0))  # type: ignore[arg-type]
    assert layer.eval().train() is layer


def test_a_copy_of_a_part_takes_nothing_else_along() -> None:
    model = upcast.patch(net())
    model.head.train()
    assert 2 * len(pickle.dumps(model.head)) < len(pickle.dumps(model))
    assert copy.deepcopy(model.head).train().training


def test_a_frozen_body_stays_in_float16() -> None:
    model = upcast.patch(net())
    head_on_a_frozen_body(model)
    assert set(half_weights(model)) == {"embed.weight", "conv.weight", "body.weight"}


def test_inference_does_not_begin_to_train() -> None:
    model = upcast.patch(net())
    embedded = model.embed(IDS[:, :3]).detach().requires_grad_()
    model.head(model.body(embedded)).sum().backward()  # saliency: a gradient with respect to the input
    loss_of(model).backward()
    model.zero_grad()
    with torch.no_grad():
        model.train()(IDS)  # dropout for its noise, say
    model.eval()(IDS)
    assert_patched(model)
    fresh = upcast.patch(net().train())  # its mode says nothing: every fresh module is in it
    fresh(IDS)
    assert_patched(fresh)


def test_a_gradient_that_was_not_computed_is_an_error_before_it_is_used() -> None:
    model = upcast.patch(net())
    assert model.head.weight.grad is None
    loss_of(model).backward()
    with pytest.raises(upcast.UpcastError, match=r"gradient .* was not computed.*model\.train\(\)"):
        [parameter.grad for parameter in model.parameters()]
    with pytest.raises(upcast.UpcastError, match=r"gradient .* was not computed"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(upcast.UpcastError, match=r"requires_grad_\(True\)"):
        torch.autograd.grad(loss_of(model), [model.head.weight])
    want, model.head.weight.requires_grad = rounded(net()), True  # the remedy, though it said so before
    (got,), (wanted,) = (torch.autograd.grad(loss_of(each), [each.head.weight]) for each in (model, want))
    assert relative_error(got, wanted) < 1e-5


def test_a_flag_that_torch_hands_over_asks_for_no_gradient() -> None:
    model, other = upcast.patch(net()), upcast.patch(net())
    model.load_state_dict(dict(other.named_parameters()), assign=True)
    assert model.head.weight is other.head.weight
    assert_patched(model)
    torch.nn.Parameter(model.head.weight)
    assert_patched(model)


def test_trainable_freezes_the_others() -> None:
    model = upcast.patch(net(), trainable=["head"])
    fit(model.train(), adam(model.parameters()))
    assert set(half_weights(model)) == {"embed.weight", "conv.weight", "body.weight"}
    assert not model.body.weight.requires_grad


def test_unpatch_gives_back_what_was_trained() -> None:
    got, want = upcast.patch(net()), rounded(net())
    for model in (got, want):
        plain_loop(model)
    upcast.unpatch(got)
    assert not any("train" in module.__dict__ for module in got.modules())
    assert not got._forward_pre_hooks
    assert relative_error(got(IDS), want(IDS)) < 1e-5
    assert all(parameter.requires_grad for parameter in got.parameters())

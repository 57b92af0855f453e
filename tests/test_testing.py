"""``auxin.testing.check`` itself: what it takes, what it says, and that it touches nothing."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from auxin import Duplicate, GrowthError, Insert
from auxin.randomness import random_data
from auxin.testing import Report, check
from auxin.testing.exact import digest, exact

WIDTH = 6


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(0.1), Block(0.1)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Jittery(Net):
    """Random in train mode by a hand of its own."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class Idle(Block):
    """Holds a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.ones(2))


EDIT = Duplicate("blocks", by=1)
PROBE = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def test_report() -> None:
    report = check(Net(), EDIT, adam, PROBE)
    assert isinstance(report, Report) and report.preserves
    assert report.difference == 0.0 and report.train_difference == 0.0
    assert report.parameters == 4 and report.notes == () and report.seconds > 0
    assert {"function", "optimizer", "rollback", "replay", "checkpoint"} <= set(report.checks)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seconds = 0.0  # type: ignore[misc]


def test_objects_are_copied_and_nothing_is_touched() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = StepLR(optimizer, 3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    model(PROBE).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    average.update_parameters(model)
    everything = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    before, drawn = exact(everything), exact(random_data())
    report = check(model, EDIT, optimizer, PROBE, companions=[schedule, average])
    assert report.difference == 0.0
    assert not before.differences(exact(everything))
    assert drawn.values() == exact(random_data()).values()


def test_functions_leave_the_model_alone() -> None:
    model = Net()
    before = exact(model)
    check(model, EDIT, adam, PROBE, companions=lambda model, optimizer: [StepLR(optimizer, 2), AveragedModel(model)])
    assert not before.differences(exact(model))


def test_several_optimizers() -> None:
    def two(model: Net) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.blocks.parameters(), lr=0.1), torch.optim.Adam(model.head.parameters())]

    assert check(Net(), EDIT, two, PROBE, companions=lambda model, *both: [StepLR(o, 2) for o in both]).checks


def test_own_loss_and_a_batch_with_targets() -> None:
    seen = []

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append(batch[1])
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    batch = (PROBE, torch.tensor([0, 1, 0, 1]))
    assert check(Net(), EDIT, adam, lambda: batch, loss=loss, steps=3).checks
    assert all(target is batch[1] for target in seen)


def test_surgery_by_hand() -> None:
    def append(model: Net) -> None:
        model.blocks.append(Block())

    report = check(Net(), append, adam, PROBE, companions=lambda model, optimizer: [AveragedModel(model)])
    assert not report.preserves and report.difference is None and report.notes == ()


def test_group_for_new_parameters() -> None:
    def halves(model: Net) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": model.blocks.parameters()}, {"params": model.head.parameters()}], lr=0.1)

    norm = Insert("blocks", functools.partial(nn.LayerNorm, WIDTH), init="default")
    with pytest.raises(GrowthError, match="Pass group="):
        check(Net(), norm, halves, PROBE)
    assert check(Net(), norm, halves, PROBE, group=1).checks


def test_a_refused_edit_says_so() -> None:
    with pytest.raises(GrowthError, match="has no child 'nowhere'"):
        check(Net(), Duplicate("nowhere"), adam, PROBE)


def test_random_networks_are_not_compared_in_train_mode() -> None:
    report = check(Jittery(), EDIT, adam, PROBE)
    assert report.difference == 0.0 and report.train_difference is None
    assert report.notes == ("train mode not compared: the network is random there even without dropout",)


def test_what_never_learned_need_not_learn_in_a_copy() -> None:
    model = Net()
    model.blocks = nn.ModuleList([Idle(), Idle()])
    report = check(model, EDIT, adam, PROBE)
    assert report.notes == ("blocks.2.idle gets no gradient, and neither does blocks.1.idle",)
    with pytest.raises(AssertionError, match="learning: no gradient has reached blocks.2.idle in 3 steps"):
        check(model, Insert("blocks", Idle, init="default"), adam, PROBE)


def test_frozen_layers_stay_frozen() -> None:
    model = Net()
    for p in model.blocks[1].down.parameters():
        p.requires_grad_(False)
    model.head.requires_grad_(False)
    report = check(
        model,
        Duplicate("blocks", order=[0, 1, 0]),
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1),
        PROBE,
    )
    assert report.difference == 0.0


def test_forms_that_do_not_go_together() -> None:
    model = Net()
    optimizer = adam(model)
    with pytest.raises(GrowthError, match="companions=lambda model, optimizer"):
        check(model, EDIT, adam, PROBE, companions=[StepLR(optimizer, 3)])
    with pytest.raises(GrowthError, match="optimizer=lambda model"):
        check(model, EDIT, optimizer, PROBE, companions=lambda model, optimizer: [])
    with pytest.raises(GrowthError, match="torch.optim.LBFGS\\(model.parameters\\(\\)\\)"):
        check(model, EDIT, torch.optim.LBFGS(model.parameters()), PROBE)


def test_digest_sees_single_bits() -> None:
    zero = torch.tensor([0.0, 1.0])
    assert digest(zero) == digest(zero.clone()) != digest(torch.tensor([-0.0, 1.0]))
    nan = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())
    assert digest(torch.ones(2, dtype=torch.bfloat16)) != digest(torch.ones(3, dtype=torch.bfloat16))
    assert digest(torch.tensor(True)) != digest(torch.tensor(False))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["list"].append(1),
        lambda d: d["net"].eval(),
        lambda d: d["net"].head.register_forward_hook(print),
        lambda d: d["net"].head.bias.requires_grad_(False),
        lambda d: d["net"].head.bias.data.add_(1e-7),
        lambda d: setattr(d["net"].head, "bias", nn.Parameter(d["net"].head.bias.detach().clone())),
        lambda d: setattr(d["net"].head.bias, "grad", torch.zeros(2)),
        lambda d: d["optimizer"].param_groups[0].update(lr=2.0),
        lambda d: d["optimizer"].param_groups[0]["params"].reverse(),
        lambda d: d["optimizer"].state.update({d["net"].head.bias: {"step": 1}}),
        lambda d: d["map"].update(a=d["map"].pop("a")),
        lambda d: d["set"].add(2),
        lambda d: d.update(number=1.5),
    ],
)
def test_exact_sees(spoil) -> None:
    net = Net()
    things = {"net": net, "optimizer": adam(net), "list": [0], "map": {"a": 1, "b": 2}, "set": {1}, "number": 1}
    before = exact(things)
    assert not before.differences(exact(things))
    spoil(things)
    assert before.differences(exact(things))

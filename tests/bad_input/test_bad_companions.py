"""Companions that do not belong to the network, or that nobody knows: refused by name, nothing changed."""

import copy
import functools

import pytest
import torch
from growing import Net, assert_same, batch, bits, ema_of, picture, train
from torch import nn
from torch.optim import lr_scheduler

import auxin as ax
from auxin.companion import _registered

torch.set_num_threads(1)


def ready():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    return model, optimizer


def refused(match, model, *companions, also=()):
    """By ``grow`` and by ``surgery``: the message, and nothing changed."""
    before = picture(model, *companions, *also)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, ax.Duplicate("blocks", by=1), *companions, probe=batch()[0])
    assert_same(before, picture(model, *companions, *also))
    with pytest.raises(ax.GrowthError, match=match):
        with ax.surgery(model, *companions):
            model.blocks.append(copy.deepcopy(model.blocks[0]))
    assert_same(before, picture(model, *companions, *also))


def test_an_optimizer_that_lacks_a_parameter():
    model, _ = ready()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if n != "head.weight"])
    refused(r"head\.weight \(1, 8\) is in no optimizer: it would never train \(or freeze it", model, optimizer)
    with pytest.raises(ax.GrowthError, match=r"head\.weight \(1, 8\) is in no optimizer"):
        ax.Grower(model, optimizer, edits=ax.Duplicate("blocks"), when=ax.when.every(1))
    model.head.weight.requires_grad_(False)
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=batch()[0])


def test_an_optimizer_that_doubles_a_parameter():
    model, optimizer = ready()
    optimizer.param_groups[0]["params"].append(model.head.bias)
    refused(r"head\.bias is held 2 times: it would be stepped 2 times", model, optimizer)


def test_two_optimizers_that_share_a_parameter():
    model, optimizer = ready()
    refused(r"head\.bias is held 2 times", model, optimizer, torch.optim.SGD([model.head.bias], lr=0.1))


def test_an_optimizer_of_another_model():
    model, _ = ready()
    other = torch.optim.Adam(Net().parameters())
    refused(r"stem\.weight \(8, 5\) is in no optimizer", model, other)
    frozen = Net().requires_grad_(False)
    refused(
        r"Adam holds none of this model's parameters: it belongs to another model.*torch\.optim\.Adam\(model",
        frozen,
        other,
    )


def test_an_optimizer_with_state_of_another_shape():
    model, optimizer = ready()
    optimizer.state[model.head.weight]["exp_avg"] = torch.zeros(7, 8)
    refused(r"AdamW: state 'exp_avg' \(7, 8\) of head\.weight \(1, 8\) has another shape", model, optimizer)


def test_names_that_lag_behind():
    model, _ = ready()
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    optimizer.param_groups[0]["param_names"].pop()
    refused(r"16 parameters under 15 param_names", model, optimizer)


def test_a_scheduler_of_another_optimizer():
    model, optimizer = ready()
    other = torch.optim.AdamW(model.parameters())
    schedule = lr_scheduler.StepLR(other, 3)
    refused(r"StepLR drives a AdamW that was not given. Pass the optimizer together", model, optimizer, schedule)


@pytest.mark.parametrize(
    "make", [lr_scheduler.ReduceLROnPlateau, lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 3)])]
)
def test_other_schedulers_of_another_optimizer(make):
    model, optimizer = ready()
    other = torch.optim.AdamW(model.parameters())
    refused(r"drives a AdamW that was not given", model, optimizer, make(other))


def test_an_average_of_another_model():
    model, optimizer = ready()
    refused(r"AveragedModel", model, optimizer, ema_of(Net(depth=3)))
    refused(r"AveragedModel", model, optimizer, ema_of(Net(dim=4)))


def test_an_average_that_missed_a_growth():
    model, optimizer = ready()
    ema = ema_of(model)
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=batch()[0])
    refused(r"AveragedModel lacks blocks\.2\.", model, optimizer, ema)


class Shadow:
    """An average of the user's own."""

    def __init__(self, model):
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}


class Lion(torch.optim.Optimizer):
    """An optimizer of the user's own: sign of a momentum that is made at the first step."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.1)
                    p.add_(momentum.sign(), alpha=-group["lr"])
        return loss


@pytest.fixture
def registry():
    """Leave the register of followers as it was."""
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)


def test_an_unknown_companion_shows_the_line_that_registers_it(registry):
    model, optimizer = ready()
    shadow = Shadow(model)
    refused(
        r"Shadow is not a companion.*@auxin\.follow\(Shadow\) before `def f\(companion, change\)",
        model,
        optimizer,
        shadow,
    )
    with pytest.raises(ax.GrowthError, match=r"@auxin\.follow\(Shadow\)"):
        ax.Grower(model, optimizer, shadow, edits=ax.Duplicate("blocks"), when=ax.when.every(1))

    @ax.follow(Shadow)
    def follow_shadow(companion, change):
        assert companion.values.keys() == change.before.parameters.keys()
        yield
        before = companion.values
        companion.values = {
            name: before.get(next((m.old_name for m in change.moves if m.name == name), name), p.detach().clone())
            for name, p in change.after.items()
        }
        try:
            yield
        except BaseException:
            companion.values = before
            raise

    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, shadow, probe=batch()[0])
    assert shadow.values.keys() == dict(model.named_parameters()).keys()
    values = dict(shadow.values)
    with pytest.raises(ax.GrowthError, match="no child"):
        ax.grow(model, ax.Duplicate("nowhere"), optimizer, shadow, probe=batch()[0])
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, shadow, probe=batch()[0], dry_run=True)
    assert shadow.values == values


def test_an_unknown_optimizer_shows_the_line_and_works_with_it(registry):
    model, _ = ready()
    optimizer = Lion(model.parameters())
    train(model, optimizer, 2)
    refused(
        r"Lion is not a companion.*auxin\.follow\(Lion, like=torch\.optim\.AdamW\) if it keeps its state per",
        model,
        optimizer,
    )
    ax.follow(Lion, like=torch.optim.AdamW)
    old = {p: bits(s["momentum"]) for p, s in optimizer.state.items()}
    ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=batch()[0])
    assert {p: bits(optimizer.state[p]["momentum"]) for p in old} == old
    start = [bits(p) for p in model.blocks[2].parameters()]
    train(model, optimizer, 2)
    assert all(bits(p) != s for p, s in zip(model.blocks[2].parameters(), start, strict=True))


def test_following_like_something_that_nobody_follows():
    with pytest.raises(ax.GrowthError, match=r"like=Shadow\): nothing follows Shadow itself"):
        ax.follow(Lion, like=Shadow)


def test_muon_does_not_get_a_vector():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    muon = torch.optim.Muon(model.parameters(), lr=1e-2)
    before = picture(model, muon)
    with pytest.raises(
        ax.GrowthError, match=r"\(8,\): Muon only takes matrices.*auxin\.grow\(model, edit, muon, adamw\)"
    ):
        ax.grow(model, ax.Insert("", functools.partial(nn.Linear, 8, 8), init="identity"), muon)
    assert_same(before, picture(model, muon))


@pytest.mark.parametrize("what", [object(), "an average", nn.Linear(2, 2)])
def test_verify_refuses_what_grow_refuses_with_the_same_words(what):
    model, optimizer = ready()
    words = []
    for call in (
        lambda: ax.verify(model, optimizer, what),
        lambda: ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, what, probe=batch()[0]),
        lambda: ax.Grower(model, optimizer, what, edits=ax.Duplicate("blocks"), when=ax.when.every(1)),
    ):
        with pytest.raises(
            ax.GrowthError, match=rf"{type(what).__name__} is not a companion.*Register it once"
        ) as told:
            call()
        words.append(str(told.value))
    assert len(set(words)) == 1


def test_verify_tells_what_a_registration_tells(registry):
    model, optimizer = ready()
    ax.follow(Shadow, verify=lambda shadow, model: [f"Shadow lacks {n}" for n in ("a", "b")])(
        lambda shadow, change: None
    )
    with pytest.raises(ax.GrowthError, match=r"verify found 2 problems:\n  Shadow lacks a\n  Shadow lacks b"):
        ax.verify(model, optimizer, Shadow(model))


def test_verify_looks_inside_what_accelerate_has_prepared():
    model, optimizer = ready()
    schedule = lr_scheduler.StepLR(optimizer, 3)
    kinds = [
        type(name, (), {"__module__": "accelerate.x"}) for name in ("AcceleratedOptimizer", "AcceleratedScheduler")
    ]
    prepared = [kind() for kind in kinds]
    prepared[0].optimizer, prepared[1].scheduler = optimizer, schedule
    ax.verify(model, *prepared)
    schedule.base_lrs.append(0.1)
    with pytest.raises(ax.GrowthError, match=r"StepLR\.base_lrs has 2 entries for 1 groups"):
        ax.verify(model, *prepared)


class Cosine:
    """A schedule that is no scheduler of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class Ring:
    """It keeps something, nobody knows what."""


def test_only_what_may_hold_nothing_is_to_be_left_out():
    model, optimizer = ready()
    for companion in (Cosine(optimizer), Cosine(Cosine(optimizer).optimizer)):
        with pytest.raises(ax.GrowthError, match=r"Cosine is not a companion .* before `def f\(.*; yield`\.$"):
            ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, companion, probe=batch()[0])
    with pytest.raises(ax.GrowthError, match=r"Ring is not .*; or leave it out if it does not hold parameters\.$"):
        ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, Ring(), probe=batch()[0])

"""The way back to an earlier structure: every edit and surgery, grown here or in another process."""

from functools import partial

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.journal import fingerprint
from auxin.structure_history import StructureHistory


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.inner(torch.relu(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.late = nn.Sequential(nn.ReLU(), ax.Dormant(nn.Linear(8, 8)))

    def forward(self, x):
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.late(x))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
EDITS = {
    "Duplicate": ax.Duplicate("blocks", by=1),
    "Insert": ax.Insert("blocks", Block, index=1),
    "After": ax.After("inp"),
    "Wake": ax.Wake("late.1"),
    "Replace": ax.Replace("blocks.0", partial(nn.Linear, 8, 8)),
    "Remove": ax.Remove("blocks.1"),
    "a fade": ax.Insert("blocks", partial(nn.Linear, 8, 8), index=1, fade=50),
    "several": [[ax.Duplicate("blocks", by=1), ax.After("inp"), ax.Duplicate("blocks", order=[0, 0, 1, 2])]],
}


def built(edit, **options):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    grower = ax.Grower(model, optimizer, average, edits=edit, when=ax.when.every(1), probe=X, **options)
    grower.history = StructureHistory()
    return grower, average


def trained(grower, steps=2):
    optimizer = grower.optimizers[0]
    for _ in range(steps):
        grower.model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def picture(grower):
    model, (group,) = grower.model, grower.optimizers[0].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    children = {path: list(module._modules) for path, module in model.named_modules()}
    return fingerprint(model), list(model.state_dict()), trains, children, [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("name", EDITS)
def test_back_to_before_a_growth_and_forward_again(name):
    grower, average = built(EDITS[name])
    trained(grower)
    before, state = picture(grower), grower.state_dict()
    weights = {key: t.clone() for key, t in grower.model.state_dict().items()}
    output = grower.model(X)
    assert grower.step() is not None
    after, grown = picture(grower), grower.state_dict()
    trained(grower)
    grower.go_to(state)
    assert picture(grower) == before and not grower.journal.entries
    assert list(average.module.state_dict()) == list(weights)
    grower.model.load_state_dict(weights)
    assert torch.equal(grower.model(X), output)
    grower.verify()
    grower.state_dict()
    trained(grower)
    grower.go_to(grown)
    assert picture(grower) == after and len(grower.journal) == 1
    grower.verify()
    trained(grower)


@pytest.mark.parametrize("name", EDITS)
def test_back_to_before_a_growth_of_another_process(name):
    grower, _ = built(EDITS[name])
    state, before = grower.state_dict(), picture(grower)
    assert grower.step() is not None
    trained(grower)
    grown, grower.history = grower.state_dict(), StructureHistory()
    if name in ("Wake", "Replace", "Remove", "several"):
        with pytest.raises(ax.GrowthError, match="no way back to before this growth: .* Build the network that it was"):
            grower.go_to(state)
        assert grower.state_dict() == grown
    else:
        grower.go_to(state)
        assert picture(grower) == before
        grower.verify()


def test_what_others_have_changed_since_stays():
    grower, _ = built(EDITS["Duplicate"])
    state = grower.state_dict()
    grower.step()
    trained(grower)
    grower.model.attached = "by a host"
    grower.go_to(state)
    assert grower.model.attached == "by a host"


def test_a_growth_that_was_rolled_back_in_between():
    grower, _ = built([EDITS["Duplicate"], EDITS["Insert"]])
    grower.grow(EDITS["Duplicate"])
    first = grower.state_dict()
    grower.undo()
    grower.grow(EDITS["Insert"])
    trained(grower)
    grower.go_to(first)
    assert [type(entry.edit) for entry in grower.journal] == [ax.Duplicate] and len(grower.model.blocks) == 3
    grower.verify()


# ---- tensors of another shape


def wider_head(model):
    model.out = nn.Linear(8, 3)


def longer_bias(model):
    model.out.weight.data = torch.cat([model.out.weight.data, torch.zeros(1, 8)])
    model.out.bias.data = torch.cat([model.out.bias.data, torch.zeros(1)])
    model.out.out_features = 2


def fewer_rows(model):
    keep = torch.tensor([0, 2, 3])
    for name in ("weight", "bias"):
        p = getattr(model.out, name)
        p.data = torch.cat([p.data] * 4)[keep]
    model.late[1].layer.weight.requires_grad_(False)


SURGERIES = [wider_head, longer_bias, fewer_rows]
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-2),
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "LBFGS": partial(torch.optim.LBFGS, lr=1e-2),
}


def run_of(optimizer, **options):
    torch.manual_seed(0)
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    words = {"edits": EDITS["Duplicate"], "when": ax.when.every(1), "probe": X}
    grower = ax.Grower(model, optimizer(model.parameters()), average, **{**words, **options})
    grower.history = StructureHistory()
    return grower, average


def stepped(grower, average, steps=2):
    (optimizer,) = grower.optimizers

    def closure():
        optimizer.zero_grad()
        loss = grower.model(X).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        average.update_parameters(grower.model)
    optimizer.zero_grad()


def shapes_of(grower):
    """Of parameters by name, and of their states."""
    (optimizer,) = grower.optimizers
    names = {p: name for name, p in grower.model.named_parameters()}
    states = {names[p]: {k: getattr(v, "shape", None) for k, v in s.items()} for p, s in optimizer.state.items()}
    return {name: p.shape for p, name in names.items()}, states if type(optimizer) is not torch.optim.LBFGS else None


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("operation", SURGERIES)
def test_back_past_a_resize_the_optimizer_and_averages_have_the_old_shapes(operation, kind):
    grower, average = run_of(OPTIMIZERS[kind])
    stepped(grower, average)
    before, state = shapes_of(grower), grower.state_dict()
    flags = {name: p.requires_grad for name, p in grower.model.named_parameters()}
    grower.grow(EDITS["Duplicate"])
    stepped(grower, average)
    with grower.surgery():
        operation(grower.model)
    stepped(grower, average)
    grower.grow(ax.Remove("blocks.0"))
    stepped(grower, average)
    grower.go_to(state)
    assert shapes_of(grower) == before
    assert {name: p.shape for name, p in average.module.named_parameters()} == before[0]
    assert {name: p.requires_grad for name, p in grower.model.named_parameters()} == flags
    grower.verify()
    stepped(grower, average)
    grower.verify()


def test_what_no_growth_has_touched_goes_on():
    """Moments and weights of now, also where the optimizer has loaded a state in between: its objects are others."""
    grower, average = run_of(OPTIMIZERS["AdamW"])
    (optimizer,) = grower.optimizers
    stepped(grower, average)
    state = grower.state_dict()
    with grower.surgery():
        longer_bias(grower.model)
    stepped(grower, average)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5
    stepped(grower, average)
    weight = grower.model.inp.weight
    value, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    grower.go_to(state)
    assert torch.equal(weight, value) and torch.equal(optimizer.state[weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.state[grower.model.out.bias]["exp_avg"].shape == (1,)


def test_a_schedule_that_was_built_after_the_growth_loses_its_group():
    grower, average = run_of(OPTIMIZERS["AdamW"], group={"lr": 1e-3})
    (optimizer,) = grower.optimizers
    state = grower.state_dict()
    grower.grow(EDITS["Duplicate"])
    stepped(grower, average)
    later = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    again = ax.Grower(grower.model, optimizer, average, later, edits=EDITS["Duplicate"], when=ax.when.every(1), probe=X)
    again.progress.entries[:], again.history = grower.progress.entries, grower.history
    again.go_to({**again.state_dict(), "journal": state["journal"]})
    assert len(optimizer.param_groups) == len(later.base_lrs) == 1
    again.verify()


def test_other_code_has_changed_the_network_since():
    grower, average = run_of(OPTIMIZERS["AdamW"])
    state = grower.state_dict()
    grower.grow(EDITS["Duplicate"])
    stepped(grower, average)
    grower.model.out = nn.Linear(8, 4)
    with pytest.raises(ax.GrowthError, match="or other code has changed the network since"):
        grower.go_to(state)
    assert len(grower.model.blocks) == 3 and grower.model.out.out_features == 4


def test_a_companion_that_cannot_go_back_is_named():
    class Mean:
        pass

    @ax.follow(Mean)
    def follow_mean(mean, change):
        yield
        try:
            yield
        except Exception as error:
            raise RuntimeError("a bug") from error

    torch.manual_seed(0)
    model = Net()
    grower = ax.Grower(model, Mean(), edits=EDITS["Duplicate"], when=ax.when.every(1), probe=X)
    grower.history = StructureHistory()
    state = grower.state_dict()
    grower.grow(ax.Duplicate("blocks", by=1, output="keep"))
    grower.grow(ax.Remove("blocks.0"))
    grown = picture_of(grower)
    with pytest.raises(ax.GrowthError, match="a companion could not go back to before a growth: .*a bug"):
        grower.go_to(state)
    assert picture_of(grower) == grown
    with pytest.raises(ax.GrowthError, match="no way back .* an error has ended an attempt to go back"):
        grower.go_to(state)
    grower.grow(ax.Duplicate("blocks", by=1, output="keep"))
    with pytest.raises(ax.GrowthError, match="a companion could not go back to before a growth: .*a bug"):
        grower.undo()
    assert len(grower.model.blocks) == 3 and len(grower.journal) == 3


def picture_of(grower):
    return {id(m) for m in grower.model.modules()}, list(map(id, grower.model.parameters())), grower.state_dict()


def test_where_the_way_forward_fails_nothing_has_gone_back():
    """A state of another network: its growths do not fit once ours are taken back."""
    edit = ax.Duplicate("", by=1)
    other = ax.Grower(nn.Sequential(Block(), Block()), edits=edit, when=ax.when.every(1), probe=X)
    other.grow(edit)
    grower, average = run_of(OPTIMIZERS["AdamW"])
    state = grower.state_dict()
    grower.grow(EDITS["Duplicate"])
    with grower.surgery():
        longer_bias(grower.model)
    stepped(grower, average)
    before = picture_of(grower), shapes_of(grower)
    with pytest.raises(ax.GrowthError, match="growth 0 of the journal .* does not fit this model"):
        grower.go_to({**state, "journal": other.state_dict()["journal"]})
    assert (picture_of(grower), shapes_of(grower)) == before
    grower.verify()
    stepped(grower, average)


def test_hooks_that_came_since_stay_where_a_layer_behind_a_module_goes():
    grower, average = run_of(OPTIMIZERS["AdamW"])
    state, calls = grower.state_dict(), []
    grower.grow(ax.After("inp", partial(nn.Linear, 8, 8)))
    stepped(grower, average)
    grower.model.inp.register_forward_hook(lambda *_: calls.append(1))
    grower.go_to(state)
    grower.model(X)
    assert calls == [1] and len(grower.model.inp._forward_hooks) == 1


def test_a_probation_that_rolls_back_leaves_no_way_back_to_what_is_gone():
    grower, average = run_of(OPTIMIZERS["AdamW"], keep=True)
    state = grower.state_dict()
    grower.grow(EDITS["Duplicate"])
    stepped(grower, average)
    grower.undo()
    grower.record(ax.grow(grower.model, EDITS["Insert"], *grower.companions, probe=X))
    stepped(grower, average)
    grower.go_to(state)
    assert len(grower.model.blocks) == 2
    grower.verify()

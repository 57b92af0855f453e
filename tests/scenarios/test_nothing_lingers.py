"""Growths that are taken back, that come at a bad moment, and that come again and again."""

import copy
import gc
import pickle

import pytest
import torch
from growing import assert_same, picture
from torch import nn

import auxin as ax

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Run:
    def __init__(self, when=None, **kwargs):
        torch.manual_seed(0)
        self.model = Net()
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.opt = torch.optim.AdamW(groups, lr=1e-2)
        self.sched = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 200)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model)
        self.scaler = torch.amp.GradScaler("cpu")
        companions = (self.opt, self.sched, self.ema, self.scaler)
        edits = ax.Duplicate("blocks", by=1)
        self.probe = torch.randn(4, 8)
        when = when or ax.when.every(10**6)
        self.grower = ax.Grower(self.model, *companions, edits=edits, when=when, probe=self.probe, **kwargs)

    def loss(self):
        x = torch.randn(16, 8)
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    def train(self, steps):
        losses = []
        for _ in range(steps):
            self.opt.zero_grad()
            loss = self.loss()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.opt)
            self.scaler.update()
            self.sched.step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def picture(self):
        """Every value and every object that the run goes on from."""
        return picture(self.model, self.opt, self.sched, self.ema, self.scaler)


def test_a_growth_that_made_things_worse_is_undone_with_all_that_came_after_it():
    plain = Run()
    plain.train(8)
    expected = plain.train(10)
    run = Run(keep=True)
    run.train(8)
    before = run.picture()
    run.grower.grow(ax.Duplicate("blocks", by=1, output="keep"))
    run.train(7)
    run.grower.undo()
    assert_same(before, run.picture())
    assert run.train(10) == expected


def test_a_growth_asked_for_in_the_middle_of_an_accumulation_waits_for_its_end():
    run = Run(when=ax.when.at([3]))
    grown = []
    for call in range(8):
        run.loss().backward()
        grown.append(run.grower.step(1.0))
        if call % 4 == 3:
            run.opt.step()
            grown.append(run.grower.step(1.0))
            run.opt.zero_grad()
    depths = [index for index, change in enumerate(grown) if change is not None]
    assert depths == [4] and len(run.model.blocks) == 3  # asked for at the third call, done after the step
    run.grower.verify()


def test_a_growth_asked_for_between_unscale_and_step_waits_for_the_update():
    run = Run(when=ax.when.at([1]))
    run.scaler.scale(run.loss()).backward()
    run.scaler.unscale_(run.opt)
    before = run.picture()
    assert run.grower.step(1.0) is None
    assert_same(before, run.picture())
    with pytest.raises(ax.GrowthError, match="unscaled"):
        run.grower.grow(ax.Duplicate("blocks", by=1))
    run.scaler.step(run.opt)
    run.scaler.update()
    assert run.grower.step(1.0) is not None and len(run.model.blocks) == 3


def live() -> tuple[int, int]:
    gc.collect()
    storages = {}
    objects = gc.get_objects()
    for item in objects:
        if type(item) in (torch.Tensor, nn.Parameter) and item.layout == torch.strided and item.device.type == "cpu":
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), len(objects)


@pytest.mark.parametrize("keep", [False, True])
def test_fifty_growths_that_are_taken_back_leave_nothing(keep, record_property):
    run = Run(keep=keep)
    run.train(3)
    for cycle in range(52):
        run.grower.grow(ax.Duplicate("blocks", by=1))
        if keep:
            run.train(1)
        run.grower.undo()
        if cycle == 1:
            first = live()
    last = live()
    record_property("tensor bytes", f"{first[0]} -> {last[0]}")
    record_property("objects", f"{first[1]} -> {last[1]}")
    # What stood before the tests is not counted (gc.freeze): ten objects a cycle are less than one block has.
    assert last[0] <= 1.01 * first[0] and last[1] <= first[1] + 500
    members = {id(p) for group in run.opt.param_groups for p in group["params"]}
    assert all(id(p) in members for p in run.opt.state)
    assert len(run.model.blocks) == 2 and len(run.grower.journal) == 0
    run.grower.verify()


def test_a_new_layer_is_like_its_neighbours_and_the_network_an_ordinary_one():
    run = Run()
    run.model.eval()
    run.model.to(torch.float64)
    seen = []
    run.model.blocks[1].register_forward_hook(append_to := seen_by(seen))
    run.opt.zero_grad()
    run.grower.probe = run.probe.double()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    new, old = run.model.blocks[2], run.model.blocks[1]
    for (name, p), (_, q) in zip(new.named_parameters(), old.named_parameters(), strict=True):
        assert (p.dtype, p.device, p.requires_grad) == (q.dtype, q.device, q.requires_grad), name
        decay = [g["weight_decay"] for g in run.opt.param_groups if any(x is p for x in g["params"])]
        assert decay == [0.1 if p.dim() > 1 else 0.0], name
    assert new.training == old.training and list(new._forward_hooks.values()) == [append_to]
    x = run.probe.double()
    expected = run.model(x)
    run.model.blocks[1]._forward_hooks.clear()
    new._forward_hooks.clear()
    assert torch.equal(pickle.loads(pickle.dumps(run.model))(x), expected)
    assert torch.equal(copy.deepcopy(run.model)(x), expected)
    exported = torch.export.export(run.model, (x,))
    assert torch.allclose(exported.module()(x), expected)


def seen_by(seen):
    def hook(*_):
        seen.append(1)

    return hook

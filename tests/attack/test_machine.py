"""Random networks under random sequences of growing, training, saving, loading, trying and undoing."""

import copy
import functools
import json
import random
import tempfile

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import auxin as ax

torch.set_num_threads(1)


class Dense(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Conv(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(dim, dim, 3, padding=1), nn.BatchNorm1d(dim)

    def forward(self, x):
        return x + self.norm(torch.relu(self.conv(x)))


class Attention(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.mix(y, y, y, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, dim=5):
        super().__init__()
        self.cell = nn.LSTM(dim, dim, batch_first=True)

    def forward(self, x):
        return x + self.cell(x)[0]


class Normed(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(dim, dim))
        self.down = nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """An embedding that is the head too, and one norm at two places."""

    def __init__(self, depth):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Attention() for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.again = self.norm
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.norm(self.tokens(ids))
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(x))


class Stack(nn.Module):
    def __init__(self, block, depth):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


FAMILIES = {
    "mlp": (lambda: Stack(Dense, 2), (4, 6), Dense),
    "cnn": (lambda: Stack(Conv, 2), (3, 4, 7), Conv),
    "gpt": (lambda: Tied(2), None, Attention),
    "lstm": (lambda: Stack(Recurrent, 1), (3, 4, 5), Recurrent),
    "weight norm": (lambda: Stack(Normed, 2), (4, 6), Normed),
}
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-3),
    "fused": functools.partial(torch.optim.Adam, lr=1e-3, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-3, foreach=True),
    "adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
}
SCHEDULES = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 3),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=10_000, cycle_momentum=False),
    "sequential": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=4), lr_scheduler.MultiStepLR(opt, [2, 5])], [4]
    ),
}


class World:
    """One random run; two worlds of the same plan are the same to the bit."""

    def __init__(self, plan):
        torch.manual_seed(plan["seed"])
        make, shape, self.block = FAMILIES[plan["family"]]
        self.model = make()
        self.fired = []
        if plan["frozen"]:
            next(iter(self.model.blocks.parameters())).requires_grad_(False)
        if plan["hooked"]:
            self.model.blocks[0].register_forward_hook(lambda *_: self.fired.append(1))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if plan["groups"]:
            flat = [p for p in trained if p.dim() < 2]
            groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1}, {"params": flat}]
            trained = [group for group in groups if group["params"]]
        self.opt = OPTIMIZERS[plan["optimizer"]](trained)
        self.sched = SCHEDULES[plan["schedule"]](self.opt)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model, use_buffers=plan["buffers"])
        self.x = torch.randint(11, (3, 5)) if shape is None else torch.randn(shape)
        options = {"edits": [], "when": ax.when.every(10**6), "probe": self.x, "keep": plan["keep"]}
        self.grower = ax.Grower(self.model, self.opt, self.sched, self.ema, **options)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            loss = (self.model(self.x) + 0.01 * torch.randn(())).square().mean()
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            self.sched.step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def values(self):
        states = [self.model.state_dict(), self.ema.state_dict(), self.opt.state_dict(), self.sched.state_dict()]
        return copy.deepcopy([*states, torch.get_rng_state(), self.grower.state_dict()])

    def check(self):
        self.grower.verify()
        ax.verify(self.model, self.opt, self.sched, self.ema)


def flat(value):
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
    if isinstance(value, dict):
        return [(key, flat(item)) for key, item in value.items()]
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


def assert_equal(a, b):
    assert flat(a) == flat(b)


def plan_of(generator):
    return {
        "seed": generator.randrange(10**6),
        "family": generator.choice(list(FAMILIES)),
        "optimizer": generator.choice(list(OPTIMIZERS)),
        "schedule": generator.choice(list(SCHEDULES)),
        "frozen": generator.random() < 0.3,
        "hooked": generator.random() < 0.3,
        "groups": generator.random() < 0.5,
        "buffers": generator.random() < 0.5,
        "keep": generator.random() < 0.5,
    }


def edit_of(world, generator):
    length = len(world.model.blocks)
    kind = generator.random()
    if kind < 0.35:
        by, order = generator.randint(1, min(2, length)), generator.choice(["interleave", "stack", "middle", "last"])
        state = generator.choice(["fresh", "copy"])
        return ax.Duplicate("blocks", by=by, order=order, output=generator.choice(["zero", "keep"]), state=state)
    if kind < 0.75 or length < 2:
        init = generator.choice(["preserve", "default"])
        return ax.Insert("blocks", world.block, index=generator.randint(-length, length), init=init)
    return ax.Remove(f"blocks.{generator.randrange(length)}")


def grow(world, generator):
    before = world.values()
    try:
        world.grower.grow(edit_of(world, generator))
        return True
    except ax.GrowthError:
        assert_equal(before, world.values())  # refused: nothing has changed
        return False


def step_grow_and_undo(world, generator, plan):
    before = world.values()
    if grow(world, generator):
        if plan["keep"] and generator.random() < 0.5:
            world.train(2)
        world.grower.undo()
        assert_equal(before, world.values())


def step_trial(world, generator, plan):
    before = world.values()
    with world.grower.trial(None):
        grow(world, generator)
        world.train(2)
    assert_equal(before, world.values())


def step_surgery(world, generator, plan):
    if plan["family"] == "weight norm":  # a parametrization has no plain form: such a surgery cannot be replayed
        return
    before = world.values()
    try:
        with world.grower.surgery():
            world.model.blocks.append(world.block())
    except ax.GrowthError:  # a frozen role in a network of several groups
        assert_equal(before, world.values())


def step_failed_surgery(world, generator, plan):
    before = world.values()
    with pytest.raises(ZeroDivisionError), world.grower.surgery():
        world.model.blocks.insert(0, world.block())
        nn.init.ones_(next(world.model.parameters()))
        raise ZeroDivisionError
    assert_equal(before, world.values())


def step_replay(world, generator, plan):
    state = torch.get_rng_state()
    fresh = World(plan)
    torch.set_rng_state(state)
    ax.replay(fresh.model, json.loads(json.dumps(world.grower.journal.to_json())), allow=[world.block])
    shapes = [(name, p.shape) for name, p in world.model.named_parameters()]
    assert [(name, p.shape) for name, p in fresh.model.named_parameters()] == shapes


def step_save_and_load(world, generator, plan):
    with tempfile.TemporaryDirectory() as place:
        ax.save(world.grower, place, extra={"step": 3})
        saved = world.values()
        losses = world.train(2)
        fresh = World(plan)
        assert ax.load(place, fresh.grower, allow=[world.block]) == {"step": 3}
        assert_equal(saved[0], fresh.model.state_dict())
        assert_equal(saved[4], torch.get_rng_state())
        assert fresh.train(2) == losses
        assert_equal(world.values()[:4], fresh.values()[:4])


STEPS = [step_grow_and_undo, step_trial, step_surgery, step_failed_surgery, step_replay, step_save_and_load]


def sequence(seed):
    generator = random.Random(seed)
    plan = plan_of(generator)
    world = World(plan)
    world.train(1)
    done = []
    for _ in range(generator.randint(3, 6)):
        kind = generator.random()
        if kind < 0.35:
            done.append("grow" if grow(world, generator) else "refused")
        elif kind < 0.55:
            done.append("train")
            world.train(generator.randint(1, 3))
        else:
            step = generator.choice(STEPS)
            done.append(step.__name__)
            step(world, generator, plan)
        world.check()
    return done


@pytest.mark.parametrize("block", range(20))
def test_ten_random_sequences(block):
    for seed in range(10 * block, 10 * block + 10):
        sequence(seed)


@pytest.mark.long
@pytest.mark.parametrize("block", range(20))
def test_a_hundred_random_sequences(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        sequence(seed)

"""New parameters warm up over optimizer steps of their own; what was there trains on as before."""

import pytest
import torch
from torch import nn

import auxin as ax

STEPS = 4
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def ready(name, rewarm):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(4, 2))
    optimizer = OPTIMIZERS[name](model.parameters())
    x = torch.randn(8, 4)
    step(model, optimizer, x)
    optimizer.zero_grad()
    change = ax.grow(model, ax.Insert("", Block, index=1), optimizer, probe=x, rewarm=rewarm)
    return model, optimizer, x, change


def step(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_kth_update_is_a_part_of_the_full_one(name):
    model, optimizer, x, change = ready(name, STEPS)
    assert f"warms up over {STEPS} optimizer steps" in str(change)
    new = {id(p) for p in change.parameters}
    for k in range(1, STEPS + 3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        full = full_step(model, optimizer, x)
        assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
        step(model, optimizer, x)
        for n, p in model.named_parameters():
            share = min(1.0, k / STEPS) if id(p) in new else 1.0
            wanted = full[n] if share == 1 else torch.lerp(before[n], full[n], share)
            assert torch.equal(p, wanted), (n, k)


def full_step(model, optimizer, x):
    """What a step without a warm-up would give; everything is put back."""
    from auxin.trial import Snapshot

    snapshot = Snapshot([model, optimizer])
    snapshot.take()
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        hooks.clear()
    step(model, optimizer, x)
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    snapshot.restore()
    return found


def test_old_parameters_are_bit_for_bit_as_without():
    runs = [ready("AdamW", rewarm) for rewarm in (0, STEPS)]
    new = {n for n, p in runs[0][0].named_parameters() if any(p is q for q in runs[0][3].parameters)}
    for model, optimizer, x, _ in runs:
        step(model, optimizer, x)
    one, other = (dict(run[0].named_parameters()) for run in runs)
    assert all(torch.equal(one[n], other[n]) for n in one if n not in new)
    assert any(not torch.equal(one[n], other[n]) for n in new)


def test_it_ends_and_leaves_no_hook():
    model, optimizer, x, _ = ready("AdamW", STEPS)
    for _ in range(STEPS):
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        step(model, optimizer, x)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("rewarm", [-1, 2.5, None, True])
def test_bad_numbers(rewarm):
    model = nn.Sequential(Block())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ax.GrowthError, match="rewarm="):
        ax.grow(model, ax.Insert("", Block), optimizer, probe=torch.ones(2, 4), rewarm=rewarm)


def test_several_optimizers_warm_up_what_is_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(4, 2))
    matrices = [p for p in model[0].parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    muon, adam = torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)
    x = torch.randn(8, 4)
    ax.grow(model, ax.Insert("", Block, index=1), muon, adam, probe=x, rewarm=STEPS)
    for optimizer in (muon, adam):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(x).square().mean().backward()
        optimizer.step()
        moved = {n: float((p - before[n]).detach().abs().max()) for n, p in model.named_parameters()}
        assert {n for n, d in moved.items() if d} <= {n for n, p in model.named_parameters() if _in(optimizer, p)}
        optimizer.zero_grad()
    assert len(muon._optimizer_step_pre_hooks) == len(adam._optimizer_step_pre_hooks) == 1


def _in(optimizer, parameter):
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])

"""N-BEATS-like networks grow: the new block runs, changes nothing at first, and everything in it learns."""

import copy
import pickle

import pytest
import torch
from look_alikes import BasisBlock, Block, Convolutions, Flat, Stacks, masked, past

import auxin as ax

torch.set_num_threads(1)


def ready(build, *args, **options):
    torch.manual_seed(0)
    model = build(*args, **options)
    return model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def probe_of(model):
    return {"batch": masked()} if isinstance(model, Flat) else past()


def run(model, seed=0):
    return model(masked(seed) if isinstance(model, Flat) else past(seed))


def train(model, optimizer, steps):
    losses = []
    for step in range(steps):
        loss = run(model, step).sub(past(step).roll(4, -1)[:, -4:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad()
    return losses


GROWN = {
    "flat, at the end": (Flat, {}, ax.Duplicate("blocks", by=1), "blocks.3"),
    "flat, a block of curves": (Flat, {}, ax.Duplicate("blocks", order=[0, 1, 1, 2]), "blocks.2"),
    "flat, all": (Flat, {}, ax.Duplicate("blocks"), "blocks.1"),
    "flat, one of another kind": (Flat, {}, ax.Insert("blocks", BasisBlock, index=1), "blocks.1"),
    "in a stack": (Stacks, {}, ax.Duplicate("stacks.0.blocks", by=1), "stacks.0.blocks.2"),
    "in a stack of one": (Stacks, {"blocks": 1}, ax.Duplicate("stacks.0.blocks", by=1), "stacks.0.blocks.1"),
    "in the last stack": (Stacks, {}, ax.Duplicate("stacks.1.blocks", order=[0, 0, 1]), "stacks.1.blocks.1"),
    "a new one in a stack": (Stacks, {}, ax.Insert("stacks.0.blocks", Block), "stacks.0.blocks.2"),
    "a stack in front": (Stacks, {}, ax.Duplicate("stacks", order=[0, 0, 1]), "stacks.1"),
    "the only stack, of one block": (Stacks, {"stacks": 1, "blocks": 1}, ax.Duplicate("stacks"), "stacks.1"),
    "a stack at the end": (Stacks, {}, ax.Duplicate("stacks", by=1), "stacks.2"),
    "a stack at the end, nothing frozen": (Stacks, {"frozen": False}, ax.Duplicate("stacks", by=1), "stacks.2"),
    "the last block, nothing frozen": (
        Stacks, {"frozen": False}, ax.Duplicate("stacks.1.blocks", by=1), "stacks.1.blocks.2",
    ),
    "convolutions": (Convolutions, {}, ax.Duplicate("res_blocks", by=1), "res_blocks.3"),
}  # fmt: skip

AT_THE_END = [name for name in GROWN if "the end" in name or "the last block" in name]


@pytest.mark.parametrize("name", GROWN)
def test_the_new_block_runs_and_learns_and_the_function_stays(name):
    build, options, edit, at = GROWN[name]
    model, optimizer = ready(build, **options)
    train(model, optimizer, 3)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = run(model)
    change = ax.grow(model, edit, optimizer, average, probe=probe_of(model))
    assert at in dict(change.added) and torch.equal(run(model), before) and torch.equal(run(average.module), before)
    ran = []
    model.get_submodule(at).register_forward_hook(lambda *_: ran.append(1))
    run(model)
    assert ran
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(f"{at}.") and p.requires_grad}
    losses = train(model, optimizer, 4)
    now = dict(model.named_parameters())
    still = {n for n, p in start.items() if torch.equal(p, now[n])}
    # behind the last block nothing uses what is left over
    assert still <= {n for n in start if "backcast" in n and name in AT_THE_END} and losses[-1] < 2 * losses[0]
    assert set(still) == {n for note in change.notes for n in still if n in note}
    ax.verify(model, optimizer, average)


@pytest.mark.parametrize("name", ["flat, at the end", "a stack in front", "in a stack"])
def test_what_is_left_is_what_one_would_have_written(name):
    build, options, edit, _ = GROWN[name]
    model, optimizer = ready(build, **options)
    ax.grow(model, edit, optimizer, probe=probe_of(model))
    train(model, optimizer, 2)
    by_hand = {"flat, at the end": lambda: Flat(Block, BasisBlock, Block, Block), "a stack in front": lambda: Stacks(3)}
    written = by_hand.get(name, Stacks)()
    if name == "in a stack":
        written.stacks[0].blocks_list.append(Block())
        written.stacks[0].blocks.append(written.stacks[0].blocks_list[-1])
    written.load_state_dict(model.state_dict())
    twins = [written, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(torch.equal(run(twin), run(model)) for twin in twins)


def test_by_hand_a_block_in_the_module_list_alone_never_runs():
    model, optimizer = ready(Stacks)
    before = run(model)
    model.stacks[0].blocks.append(Block())
    assert torch.equal(run(model), before)
    model.stacks[0].blocks_list.append(model.stacks[0].blocks[2])
    assert not torch.equal(run(model), before)  # in both, its random forecast is added at once


def test_by_hand_a_zeroed_basis_never_learns():
    model, optimizer = ready(Flat)
    block = copy.deepcopy(model.blocks[1])
    torch.nn.init.zeros_(block.past), torch.nn.init.zeros_(block.ahead)
    model.blocks.append(block)
    run(model).sum().backward()
    assert not any(p.grad.any() for p in block.parameters() if p.grad is not None)


REFUSED = {
    "one block several times": (
        Stacks, {"shared": True}, "stacks.0.blocks",
        r"blocks\.1 shares all its weights with stacks\.0\.blocks\.0.*Untie\('stacks\.0\.blocks'\)",
    ),
    "one block several times, by a list of one's own": (
        Flat, {}, "blocks", r"shares all its weights with blocks\.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_untouched(name):
    build, options, at, words = REFUSED[name]
    model, optimizer = ready(build, **options)
    if build is Flat:
        model.blocks.append(model.blocks[0])
    ids, before = [id(m) for m in model.modules()], run(model)
    with pytest.raises(ax.GrowthError, match=words):
        ax.grow(model, ax.Duplicate(at, by=1), optimizer, probe=probe_of(model))
    assert [id(m) for m in model.modules()] == ids and torch.equal(run(model), before)


def test_a_stack_that_shares_one_block_is_copied_with_its_sharing():
    model, optimizer = ready(Stacks, shared=True, frozen=False)
    before = run(model)
    ax.grow(model, ax.Duplicate("stacks", order=[0, 0, 1]), optimizer, probe=past())
    new = model.stacks[1]
    assert torch.equal(run(model), before) and new.blocks[0] is new.blocks[1] is new.blocks_list[1]
    assert new.blocks[0] is not model.stacks[0].blocks[0]
    train(model, optimizer, 3)


def test_a_network_that_has_predicted_in_inference_mode_still_grows():
    """Lightning's predict runs in inference mode; what a network keeps from there cannot be written to any more."""

    class Keeps(Flat):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", None, persistent=False)
            self.last = None

        def forward(self, batch):
            out = super().forward(batch)
            self.seen, self.last = out.detach().mean(0), {"out": out.detach()}
            return out

    model, optimizer = ready(Keeps)
    with torch.inference_mode():
        run(model)
    assert model.seen.is_inference() and model.last["out"].is_inference()
    ax.sites(model, {"batch": masked()})
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe={"batch": masked()})
    assert change.max_difference == 0 and len(model.blocks) == 4

"""A growth costs what it touches: forwards, records and walks are counted at two depths; no clock is read."""

import gc
import weakref

import pytest
import torch
from torch import nn

import auxin as ax
from auxin import listing, record
from auxin.anatomy import probe
from auxin.checkpoint import manifest

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def run(depth, **options):
    torch.manual_seed(0)
    model = Net(depth)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = torch.optim.swa_utils.AveragedModel(model)
    x = torch.randn(16, 4)
    options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(1), "probe": x, **options}
    grower = ax.Grower(model, optimizer, schedule, average, **options)

    def train(steps=2):
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            optimizer.zero_grad()

    train()
    return model, grower, train


def counted(monkeypatch, owner, name):
    """How often ``owner.name`` is called from now on."""
    calls, original = [], getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize("depth", [3, 24])
@pytest.mark.parametrize(
    "edit", [ax.Duplicate("blocks", by=1), ax.Insert("blocks", Block), ax.Insert("blocks", Block, 1)]
)
def test_two_forwards_and_two_records_of_the_network_whatever_the_depth(monkeypatch, depth, edit):
    model, grower, train = run(depth, edits=edit)
    grower.step()
    train()
    forwards = counted(monkeypatch, type(model), "forward")
    records = counted(monkeypatch, probe, "Record")
    assert grower.step() is not None
    assert sum(args[0] is model for args in forwards) == 2  # before, where the plan looks too; and after
    assert len(forwards) == (2 if isinstance(edit, ax.Duplicate) else 4)  # averages of copies are proved block by block
    assert sum(args[0] is model for args in records) == 2


def test_walks_over_the_network_do_not_become_more_with_the_depth(monkeypatch):
    found = []
    for depth in (3, 24):
        with monkeypatch.context() as patch:
            model, grower, train = run(depth)
            grower.step()
            train()
            walks = counted(patch, listing, "named_modules")
            torchs = counted(patch, nn.Module, "named_modules")
            grower.step()
            whole = [args for args in (*walks, *torchs) if args[0] is model]
            found.append(len(whole))
    assert found[0] == found[1]


def test_the_graph_of_the_proof_begins_at_the_block_that_is_copied(monkeypatch):
    model, grower, _ = run(6)
    recording = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: recording.append(output.requires_grad))
    grower.step()
    assert recording[-7:] == [False] * 5 + [True, True]


def test_weights_that_are_used_before_their_module_is_called_are_found_all_the_same():
    class Ahead(Net):
        """Uses the last block's weights in front of all blocks, by hand."""

        def forward(self, x):
            for block in self.blocks:
                x = x + block.down(torch.relu(nn.functional.linear(x, block.up.weight, block.up.bias)))
                x = x + 0 * block(x)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Ahead(2), torch.randn(16, 4)
    change = ax.grow(model, ax.Duplicate("blocks", by=1, output="keep"), probe=x)
    assert change.gradient_ratio is not None and change.gradient_ratio > 0


def test_a_reentrant_checkpoint_around_the_blocks_still_has_gradients():
    class Checkpointed(Net):
        def forward(self, x):
            x = x + self.head(x)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
            return self.head(x)

    torch.manual_seed(0)
    model, x = Checkpointed(2), torch.randn(16, 4)
    assert ax.grow(model, ax.Duplicate("blocks", by=1), probe=x).gradient_ratio is not None


def test_what_has_grown_and_is_removed_is_freed_at_once():
    gc.collect()
    gc.disable()
    try:
        model, grower, train = run(3)
        grower.step()
        train()
        block = weakref.ref(model.blocks[3])
        grower.grow(ax.Remove("blocks.3"))
        train(1)
        assert block() is None
    finally:
        gc.enable()


def test_a_save_sums_up_every_byte_once(tmp_path, monkeypatch):
    _, grower, _ = run(3)
    summed = counted(monkeypatch, manifest.Checksum, "update")
    ax.save(grower, tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.name != manifest.NAME]
    assert sum(len(data) for _, data in summed) == sum(f.stat().st_size for f in files)


def test_a_record_and_a_listing_name_what_torch_names():
    shared = nn.Linear(4, 4)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(shared, nn.Sequential(shared, nn.BatchNorm1d(4)), scripted, nn.Linear(4, 4))
    model[3].weight = shared.weight
    for found in (listing.listing(model), record.Record(model)):
        assert list(found.modules) == [name for name, _ in model.named_modules()]
        assert [(n, id(p)) for n, p in found.parameters.items()] == [(n, id(p)) for n, p in model.named_parameters()]
        assert list(found.buffers) == [name for name, _ in model.named_buffers()]
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in listing.every_tensor(model)] == [name for name, _ in every]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_waits_during_a_growth_and_is_as_before_afterwards(enabled):
    seen = []
    _, grower, _ = run(3, on_growth=lambda change: seen.append(gc.isenabled()))
    grower.model.blocks[0].register_forward_hook(lambda *_: seen.append(gc.isenabled()))
    try:
        gc.enable() if enabled else gc.disable()
        grower.step()
        assert seen == [False, False, enabled]
        with pytest.raises(ax.GrowthError):
            grower.grow(ax.Insert("blocks", nn.ReLU))
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_an_average_whose_copy_of_a_block_is_not_at_rest_is_refused_without_a_forward_of_it(monkeypatch):
    from auxin.follow import average

    original = average.builder

    def loud(live, twin):
        build = original(live, twin)

        def building(new, neighbour):
            module = build(new, neighbour)
            torch.nn.init.ones_(module.down.weight)
            return module

        return building

    model, grower, _ = run(3)
    before = [value.clone() for value in grower.companions[-1].state_dict().values()]
    monkeypatch.setattr(average, "builder", loud)
    forwards = counted(monkeypatch, type(model), "forward")
    with pytest.raises(ax.GrowthError, match="the outputs of its averaged network on the probe would be others"):
        grower.step()
    assert all(args[0] is model for args in forwards)
    assert len(model.blocks) == 3
    now = grower.companions[-1].state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))

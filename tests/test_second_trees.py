"""A second tree over the same blocks grows in step with the network, or the growth is refused by name."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import auxin as ax

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x):
        return x + self.inner(torch.relu(self.norm(x)))


class Body(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks, self.depth = nn.ModuleList(Block() for _ in range(depth)), depth

    def forward(self, x):
        assert self.depth == len(self.blocks)
        for block in self.blocks:
            x = block(x)
        return x


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.inp, self.body, self.out = nn.Linear(6, 6), Body(depth), nn.Linear(6, 1)

    def forward(self, x):
        return self.out(self.body(self.inp(x)))


def built(depth=3):
    torch.manual_seed(0)
    return Net(depth)


def by_hand(net):
    """Containers of its own around compiled blocks, as Accelerate makes them, made by hand."""
    tree, body = copy.copy(net), copy.copy(net.body)
    body._modules = {"blocks": nn.ModuleList(torch.compile(block, backend="eager") for block in net.body.blocks)}
    tree._modules = {"inp": net.inp, "body": body, "out": net.out}
    tree.__dict__["_orig_mod"] = net
    return tree


def by_accelerate(net):
    utils = pytest.importorskip("accelerate.utils")
    return utils.compile_regions(net, backend="eager")


def uncompiled(net):
    tree, body = copy.copy(net), copy.copy(net.body)
    body._modules = {"blocks": nn.ModuleList(net.body.blocks)}
    tree._modules = {**net._modules, "body": body}
    tree.__dict__["_orig_mod"] = net
    return tree


TREES = [by_hand, by_accelerate, uncompiled]
AT = "body.blocks"
EDITS = {
    "Duplicate": ax.Duplicate(AT, by=2),
    "Insert": ax.Insert(AT, Block, index=1),
    "Remove": ax.Remove(f"{AT}.0"),
    "Replace": ax.Replace(f"{AT}.1", Block),
    "After a leaf": ax.After("inp", partial(nn.Linear, 6, 6)),
    "After a block": ax.After("body", partial(nn.Linear, 6, 6)),
    "a fade": ax.Insert(AT, partial(nn.Linear, 6, 6), index=1, fade=3),
}


def paths(tree):
    return [name.replace("_orig_mod.", "") for name in tree.state_dict()]


def assert_in_step(tree, net):
    """The same tensors under the same names, and the same outputs; compiled where the others are."""
    one, other = tree.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert paths(tree) == list(other) and all(a is b for a, b in zip(one.values(), other.values(), strict=True))
    assert torch.equal(tree(X), net(X))
    assert len({type(block) for block in tree.body.blocks if not isinstance(block, nn.Linear)}) == 1
    assert tree.body.depth == net.body.depth == len(tree.body.blocks)


def trained(tree, optimizer, steps=2):
    for _ in range(steps):
        tree(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", TREES)
@pytest.mark.parametrize("name", EDITS)
def test_a_tree_around_the_network_grows_in_step(name, make):
    net = built()
    tree = make(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    trained(tree, optimizer)
    before = {path: module for path, module in tree.named_modules() if path}
    dry = ax.grow(tree, EDITS[name], optimizer, probe=X, dry_run=True)
    assert {path: module for path, module in tree.named_modules() if path} == before and str(dry)
    ax.grow(tree, EDITS[name], optimizer, probe=X)
    assert_in_step(tree, net)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in tree.parameters()}
    trained(tree, optimizer, 4)
    assert_in_step(tree, net)
    ax.verify(tree, optimizer)


@pytest.mark.parametrize("make", TREES)
def test_a_grower_of_a_tree_takes_back_saves_and_loads(make, tmp_path):
    def run():
        net = built()
        tree = make(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        words = {"edits": ax.Duplicate(AT, by=1), "when": ax.when.every(1), "probe": X}
        return tree, net, optimizer, ax.Grower(tree, optimizer, **words)

    tree, net, optimizer, grower = run()
    with grower.trial(EDITS["Insert"]):
        assert len(tree.body.blocks) == 4
        trained(tree, optimizer)
    assert_in_step(tree, net)
    assert grower.step() is not None
    grower.undo()
    assert len(tree.body.blocks) == 3
    assert_in_step(tree, net)
    assert grower.step() is not None
    trained(tree, optimizer)
    with grower.surgery():
        net.body.blocks.append(Block())
        net.body.depth += 1
    assert_in_step(tree, net)
    trained(tree, optimizer)
    ax.save(grower, tmp_path / "run")
    again, inner, _, other = run()
    ax.load(tmp_path / "run", other)
    assert_in_step(again, inner)
    assert torch.equal(again(X), tree(X))
    plain = built()
    ax.load(tmp_path / "run", plain)  # a network that nobody compiles
    assert torch.equal(plain(X), tree(X))


@pytest.mark.parametrize("make", TREES)
def test_an_average_of_such_a_tree_grows_in_step(make):
    net = built()
    tree = make(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(tree)
    for _ in range(2):
        trained(tree, optimizer)
        average.update_parameters(tree)
    expected = average(X)
    ax.grow(tree, ax.Duplicate(AT, by=1), optimizer, average, probe=X)
    assert_in_step(average.module, average.module.__dict__["_orig_mod"])
    assert torch.allclose(average(X), expected, atol=1e-6)
    trained(tree, optimizer)
    average.update_parameters(tree)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in tree.parameters()]
    assert not {id(p) for p in average.parameters()} & {id(p) for p in tree.parameters()}


def test_a_growth_that_fails_leaves_both_trees():
    net = built()
    tree = by_hand(net)
    before = paths(tree), list(tree.body.blocks)

    def refuse(change):
        raise RuntimeError("no")

    grower = ax.Grower(tree, edits=ax.Duplicate(AT, by=1), when=ax.when.every(1), probe=X, on_growth=refuse)
    with pytest.raises(RuntimeError, match="no"):
        grower.step()
    assert (paths(tree), list(tree.body.blocks)) == before
    assert_in_step(tree, net)


def test_a_tree_of_another_depth_is_refused():
    net = built()
    tree = by_hand(net)
    ax.grow(net, ax.Duplicate(AT, by=1), probe=X)  # the network alone: the tree does not hear of it
    with pytest.raises(
        ax.GrowthError, match=r"stands around a network with other blocks .* only one of the two has body.blocks.3"
    ):
        ax.grow(tree, ax.Duplicate(AT, by=1), probe=X)
    assert len(net.body.blocks) == 4


# ---- in plain attributes of the network


class Viewed(Net):
    """Runs its blocks through something that it holds beside them."""

    def __init__(self, view):
        super().__init__()
        self.__dict__["view"] = view(self.body.blocks)

    def forward(self, x):
        view = self.__dict__["view"]
        while isinstance(view, (list, tuple, dict)) and not isinstance(next(iter(view)), Block):
            view = next(iter(view.values())) if isinstance(view, dict) else view[0]
        for block in view.values() if isinstance(view, nn.ModuleDict) else view:
            x = block(x)
        return self.out(x)


VIEWS = {
    "Sequential": lambda blocks: nn.Sequential(*blocks),
    "ModuleList": lambda blocks: nn.ModuleList(blocks),
    "ModuleList in a list": lambda blocks: [nn.ModuleList(blocks)],
    "compiled": lambda blocks: nn.ModuleList(torch.compile(block, backend="eager") for block in blocks),
    "list in a list": lambda blocks: [list(blocks)],
    "list in a dict": lambda blocks: {"encoder": list(blocks)},
    "list in a tuple": lambda blocks: (list(blocks), "names"),
    "Sequential in a dict in a list": lambda blocks: [{"encoder": nn.Sequential(*blocks)}],
    "ModuleDict of the same names": lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
}


@pytest.mark.parametrize("edit", [EDITS["Duplicate"], EDITS["Insert"]])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_in_a_plain_attribute_grows_in_step(name, edit):
    torch.manual_seed(0)
    net = Viewed(VIEWS[name])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    expected = net(X)
    change = ax.grow(
        net, edit, optimizer, probe=X
    )  # it is proved that the new block runs, which only the view brings about
    assert change.max_difference == 0 and torch.equal(net(X), expected)
    new = [new.module for _, new in change.added]
    net(X).sum().backward()
    assert all(p.grad is not None for module in new for p in module.parameters())


def test_surgery_grows_views_or_finds_that_the_user_has():
    torch.manual_seed(0)
    net = Viewed(VIEWS["Sequential"])
    with ax.surgery(net, probe=X):
        net.body.blocks.append(Block())
    assert len(net.__dict__["view"]) == 4 and net.__dict__["view"][3] is net.body.blocks[3]
    with ax.surgery(net, probe=X):
        net.body.blocks.append(Block())
        net.__dict__["view"] = nn.Sequential(*net.body.blocks)
    assert len(net.__dict__["view"]) == 5


@pytest.mark.parametrize(
    "view",
    [
        lambda blocks: nn.Sequential(*blocks[:2]),
        lambda blocks: nn.Sequential(*reversed(blocks)),
        lambda blocks: [tuple(blocks)],
        lambda blocks: nn.ModuleDict(dict(zip("abc", blocks, strict=True))),
        lambda blocks: nn.ModuleDict({"first": nn.Sequential(*blocks[:2]), "rest": nn.Sequential(*blocks[2:])}),
    ],
)
def test_a_view_that_could_mean_several_things_is_refused_by_name(view):
    torch.manual_seed(0)
    net = built()
    net.__dict__["view"] = view(net.body.blocks)
    with pytest.raises(
        ax.GrowthError, match=r"view.* holds blocks of body.blocks a second time, and it is not known .* Delete it"
    ):
        ax.grow(net, EDITS["Duplicate"], probe=X)
    assert len(net.body.blocks) == 3


def test_what_shares_nothing_is_not_touched_and_one_block_may_be_looked_at():
    net = built()
    teacher, average = copy.deepcopy(net), torch.optim.swa_utils.AveragedModel(net)
    net.__dict__["teacher"], net.__dict__["average"] = teacher, [average]
    net.__dict__["tap"], net.__dict__["taps"] = (
        nn.Sequential(net.body.blocks[1]),
        [[net.body.blocks[0], net.body.blocks[2]]],
    )
    ax.grow(net, EDITS["Duplicate"], probe=X)
    assert [len(one.body.blocks) for one in (net, teacher, average.module)] == [5, 3, 3]
    assert len(net.__dict__["tap"]) == 1 and len(net.__dict__["taps"][0]) == 2
    held = [i for i, block in enumerate(net.body.blocks) if block is net.__dict__["tap"][0]][0]
    with pytest.raises(ax.GrowthError, match=r"tap.* holds a block of body.blocks a second time"):
        ax.grow(net, ax.Remove(f"{AT}.{held}"), probe=X)


def test_a_second_tree_is_no_companion():
    net = built()
    tree = uncompiled(net)
    del tree.__dict__["_orig_mod"]
    with pytest.raises(ax.GrowthError, match=r"second tree over the blocks .*__dict__\['_orig_mod'\] = model"):
        ax.grow(net, EDITS["Duplicate"], tree, probe=X)

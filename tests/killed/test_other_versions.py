"""A checkpoint meets a run that was built in another way: refused with what to do, or loaded exactly; never by half."""

import functools
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from shuffled import Block, Net
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "attack"))
from attacked import assert_same, picture

import auxin as ax

torch.set_num_threads(1)


class Run:
    """A run of which every part can be another one."""

    def __init__(self, net=Net, optimizer=torch.optim.AdamW, scheduler=StepLR, order=(0, 1, 2), extra=(), **words):
        torch.manual_seed(0)
        self.model = net().to(words.get("dtype", torch.float32))
        self.beside = nn.Parameter(torch.ones(words.get("beside", 0)))  # trained, and no part of the network
        held = list(self.model.parameters())
        groups = [{"params": held[:4], "lr": 0.02}, {"params": held[4:]}] if "groups" in words else held
        self.optimizer = optimizer([*groups, self.beside] if self.beside.numel() else groups, lr=0.01)
        made = [self.optimizer, functools.partial(scheduler, gamma=0.9), AveragedModel(self.model)]
        made[1] = made[1](self.optimizer) if scheduler is ExponentialLR else made[1](self.optimizer, step_size=3)
        self.companions = [*(made[place] for place in order), *(more() for more in extra)]
        options = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.plateau(patience=3)}
        options |= {name: words[name] for name in ("edits", "when") if name in words}
        self.grower = ax.Grower(self.model, *self.companions, **options, probe=self.batch()[:4])
        self.grower.when.load_state_dict(self.grower.when.state_dict())  # from here on attributes of its own

    def batch(self):
        return torch.randn(8, 5).to(next(self.model.parameters()).dtype)

    def train(self, steps=3):
        losses = []
        for _ in range(steps):
            loss = self.model(self.batch()).square().mean() + (self.beside.sum() - 1).square()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def saved(folder, **words):
    run = Run(**words)
    run.train()
    run.grower.grow(ax.Duplicate("blocks", by=1))
    run.train()
    ax.save(run.grower, folder, extra={"epoch": 3})
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved(folder := tmp_path_factory.mktemp("saved"))
    return folder


class Wider(Net):
    def __init__(self):
        super().__init__(16)


class OneMore(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(2, 2)


class ReNamed(Net):
    def __init__(self):
        super().__init__()
        self.layers = self.blocks
        del self.blocks

    def forward(self, x):
        return self.exit(nn.Sequential(*self.layers)(self.entry(x)))


def scaler():
    return torch.amp.GradScaler("cpu")


def another():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


SAME = r"Build the same ones, in the same order\."
KINDS = r"this run was saved with the companions \(AdamW, StepLR, AveragedModel\), the Grower has "
OTHERS = {
    "order": ({"order": (0, 2, 1)}, rf"{KINDS}\(AdamW, AveragedModel, StepLR\)\. {SAME}"),
    "class of the optimizer": ({"optimizer": torch.optim.Adam}, rf"{KINDS}\(Adam, StepLR, AveragedModel\)\. {SAME}"),
    "scheduler": ({"scheduler": ExponentialLR}, rf"{KINDS}\(AdamW, ExponentialLR, AveragedModel\)\. {SAME}"),
    "no scheduler": ({"order": (0, 2)}, rf"{KINDS}\(AdamW, AveragedModel\)\. {SAME}"),
    "no average": ({"order": (0, 1)}, rf"{KINDS}\(AdamW, StepLR\)\. {SAME}"),
    "nothing but the network": ({"order": ()}, rf"{KINDS}\(none\)\. {SAME}"),
    "a scaler more": ({"extra": (scaler,)}, rf"{KINDS}\(AdamW, StepLR, AveragedModel, GradScaler\)\. {SAME}"),
    "an optimizer more": ({"extra": (another,)}, rf"{KINDS}\(AdamW, StepLR, AveragedModel, SGD\)\. {SAME}"),
    "groups": (
        {"groups": 2},
        r"it has 1 parameter groups, here are 2.*Build the model and the optimizer as at",
    ),
    "a parameter beside": ({"beside": 2}, r"group 0 has foreign\.0\.0, the checkpoint's has not"),
    "dtype": (
        {"dtype": torch.bfloat16},
        r"float32 there, .*Only dtypes differ\. Load into `model\.to\(torch\.float32",
    ),
    "width": ({"net": Wider}, "another structure here.*same class and arguments as at the start"),
    "a layer more": ({"net": OneMore}, "another structure here.*same class and arguments as at the start"),
    "names": ({"net": ReNamed, "edits": ax.Duplicate("layers")}, "has no child 'blocks'; its children"),
    "trigger": (
        {"when": ax.when.every(3)},
        r"every\(n=3\): this state holds .*another trigger's.*Build the Grower with",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(folder, what):
    words, said = OTHERS[what]
    run = Run(**words)
    run.train(1)
    before = picture(run.model, *run.companions, run.grower)
    with pytest.raises(ax.GrowthError) as error:
        ax.load(folder, run.grower)
    assert re.search(said, str(error.value), re.DOTALL), str(error.value)
    assert_same(before, picture(run.model, *run.companions, run.grower))
    run.train(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_of_a_bare_network_is_refused_with_the_way(folder, dtype):
    net = Net().to(dtype)
    before = picture(net)
    with pytest.raises(ax.GrowthError, match=r"Only dtypes differ. Load into `model\.to\(torch\.float32\)`"):
        ax.load(folder, net)
    assert_same(before, picture(net))
    ax.load(folder, net.to(torch.float32))
    assert len(net.to(dtype).blocks) == 2


# ---- what another build may change


class Moved(Net):
    """The same network under another name, from another file."""


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"net": Moved},  # a class that was renamed: structure and names decide
        {"edits": ax.Insert("blocks", Block)},  # what may grow from now on; the journal says what has grown
        {"when": ax.when.plateau(patience=7)},
    ],
    ids=["the same", "renamed class", "other edits", "other patience"],
)
def test_what_fits_goes_on_to_the_bit(tmp_path, words):
    run = saved(tmp_path)
    expected, fresh = run.train(10), Run(**words)
    assert ax.load(tmp_path, fresh.grower) == {"epoch": 3}
    assert fresh.train(10) == expected


def test_a_network_on_the_meta_device_gets_its_weights(folder):
    with torch.device("meta"):
        net = Net()
    ax.load(folder, net)
    assert not any(p.is_meta for p in net.parameters()) and len(net.blocks) == 2


def test_a_parameter_beside_the_network_comes_back(tmp_path):
    """A learned temperature of the loss: in the optimizer, not in the network. It used to come back as it was built."""
    run = saved(tmp_path, beside=3)
    expected, fresh = run.train(10), Run(beside=3)
    ax.load(tmp_path, fresh.grower)
    kept, wanted = fresh.beside, run.beside.detach().clone()
    assert fresh.train(10) == expected and fresh.beside is kept and torch.equal(fresh.beside, wanted)
    other = Run(beside=2)
    before = picture(other.model, *other.companions, other.grower)
    with pytest.raises(ax.GrowthError, match=r"foreign\.0\.0 is \(2,\), in the checkpoint \(3,\)"):
        ax.load(tmp_path, other.grower)
    assert_same(before, picture(other.model, *other.companions, other.grower))


# ---- extra


EXTRAS = {
    "a lock": (threading.Lock, r"run\['extra'\]\['own'\]: a _thread\.lock"),
    "a generator": (torch.Generator, r"a generator\. Store `generator\.get_state\(\)`, and give it `set_state"),
    "a loader": (
        lambda: torch.utils.data.DataLoader([1]),
        "DataLoader, .*Store the numbers, text",
    ),
    "a module": (lambda: nn.Linear(2, 2), "is a ready module"),
    "a large tensor": (lambda: torch.zeros(10**6), "takes 4,000,000 bytes.*a buffer, or its own file"),
    "a parameter": (lambda: nn.Parameter(torch.zeros(2)), "cannot be written here.*detach"),
    "a function": (lambda: lambda: 0, "is a lambda"),
    "an iterator": (lambda: iter([1]), "a builtins.list_iterator"),
    "a path": (lambda: Path("here"), "PosixPath.*Store the numbers, text"),
    "generator of numpy": (lambda: np.random.default_rng(0), "Generator.*Store the numbers, text"),
}


@pytest.mark.parametrize("what", EXTRAS)
def test_an_extra_that_has_no_plain_form_is_refused(tmp_path, what):
    make, said = EXTRAS[what]
    run, extra = saved(tmp_path), {"epoch": 4, "own": make()}
    before = picture(run.model, *run.companions, run.grower)
    with pytest.raises(ax.GrowthError, match=said):
        ax.save(run.grower, tmp_path, extra=extra)
    assert_same(before, picture(run.model, *run.companions, run.grower))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert ax.load(tmp_path, Run().grower) == {"epoch": 3}

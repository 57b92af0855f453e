"""Networks that nobody thought of: grown, tried, saved, loaded and undone exactly, or refused by name, untouched."""

import functools
import warnings

import pytest
import torch
from attacked import assert_same, picture
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax

torch.set_num_threads(1)
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Res(nn.Module):
    def __init__(self, wrap=lambda layer: layer, **options):
        super().__init__()
        self.inner = wrap(nn.Linear(4, 4, **options))

    def forward(self, x):
        return x + self.inner(torch.tanh(x))


def pair(make=Res):
    return nn.Sequential(make(), make())


class TwoPaths(nn.Module):
    def __init__(self, inside=pair):
        super().__init__()
        self.first = inside()
        self.again = self.first

    def forward(self, x):
        for _ in range(2):
            for block in self.again.values() if isinstance(self.again, nn.ModuleDict) else self.again:
                x = block(x)
        return x


class ChildElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        blocks = [Res(), Res()]
        self.favourite = blocks[0]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList([Res(), Res()]) for _ in range(2))
        self.none, self.empty = nn.ModuleList(), nn.ModuleDict()

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.cfloat))

    def forward(self, x):
        return x + torch.fft.ifft(torch.fft.fft(x) * self.weight).real


class Nothing(Res):
    """Buffers and parameters that are None, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("none", None)
        self.register_parameter("neither", None)
        self.register_buffer("unsaved", torch.ones(2), persistent=False)


class Locked(Res):
    """Nothing may be set after the start."""

    def __setattr__(self, name, value):
        if hasattr(self, "inner") and name != "training":
            raise RuntimeError("locked")
        super().__setattr__(name, value)


class Uncopied(Res):
    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one of me")


class Single(Res):
    def __deepcopy__(self, memo):
        return self


class Slots(Res):
    """A slot, which copies of a module do not carry along."""

    __slots__ = ("scale",)

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "scale", torch.ones(1))

    def forward(self, x):
        return x + self.inner(torch.tanh(x)) * self.scale


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.out = pair(), nn.LazyLinear(2)

    def forward(self, x):
        return self.out(self.blocks(x))


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def normed(wrap):
    return lambda: pair(functools.partial(Res, wrap))


ROOT, KEEP = ax.Duplicate("", by=1), ax.Duplicate("", by=1, output="keep")
NORM, SPECTRAL = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
CPLX = functools.partial(nn.Linear, 4, 4, dtype=torch.cfloat)
FITS = {
    "the model is the container": (pair, ROOT),
    "two paths, copied": (TwoPaths, ax.Duplicate("again", by=1)),
    "two paths, inserted": (TwoPaths, ax.Insert("again", Res)),
    "two paths, replaced": (TwoPaths, ax.Replace("again.0", Res)),
    "two paths, removed": (TwoPaths, ax.Remove("again.0")),
    "two paths, by name": (
        lambda: TwoPaths(lambda: nn.ModuleDict({"a": Res(), "b": Res()})),
        ax.Insert("again", Res, key="c"),
    ),
    "a child that stands elsewhere too": (ChildElsewhere, ax.Duplicate("blocks")),
    "a container in a container": (Nested, ax.Duplicate("stages.1", by=2)),
    "a container of containers": (Nested, ax.Duplicate("stages", by=1)),
    "an empty Sequential": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential()), ax.Insert("1", Res)),
    "bfloat16": (lambda: pair().bfloat16(), ROOT),
    "float64": (lambda: pair().double(), ax.Insert("", Res)),
    "frozen beside": (
        lambda: nn.Sequential(Res().requires_grad_(False), Res().requires_grad_(False), nn.Linear(4, 4)),
        ax.Insert("", Res, index=1),
    ),
    "complex weights": (lambda: pair(Complex), ROOT),
    "complex outputs": (lambda: nn.Sequential(CPLX(), CPLX()), ax.Insert("", CPLX, init="identity")),
    "None for tensors": (lambda: pair(Nothing), ROOT),
    "a weight norm": (normed(NORM), ROOT),
    "a spectral norm": (normed(SPECTRAL), KEEP),
    "an old weight norm": (normed(old_weight_norm), ROOT),
    "locked attributes": (lambda: pair(Locked), ROOT),
}


def batch_for(model):
    p = next(model.parameters())
    return X.to(p.dtype) if p.dtype != torch.cfloat or isinstance(model[0], nn.Linear) else X


def train(model, optimizer, x, count=2):
    for _ in range(count):
        model(x).abs().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def built(name):
    make, edit = FITS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = batch_for(model)
    companions = [optimizer] if "old" in name else [optimizer, AveragedModel(model)]
    grower = ax.Grower(model, *companions, edits=edit, when=ax.when.every(10**6), probe=x, keep=True)
    return model, companions, x, grower, edit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FITS)
def test_grown_tried_saved_loaded_and_undone(name, tmp_path):
    model, companions, x, grower, edit = built(name)
    train(model, companions[0], x)
    before = picture(model, *companions)
    with grower.trial(edit):
        train(model, companions[0], x)
    assert_same(before, picture(model, *companions))
    change = grower.grow(edit)
    start = {id(p): p.detach().clone() for p in change.parameters if p.requires_grad}
    train(model, companions[0], x, 4)
    assert not any(torch.equal(p, start[id(p)]) for p in change.parameters if id(p) in start)
    grower.verify()
    ax.save(grower, tmp_path)
    again, others, _, resumed, _ = built(name)
    ax.load(tmp_path, resumed)
    for one, companion in ((model, companions[0]), (again, others[0])):
        train(one, companion, x)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    grower.undo()
    assert_same(before, picture(model, *companions))


REFUSED = {
    "an empty list": (Nested, ax.Insert("none", Res), "'none'.*the container is empty"),
    "an empty dict": (Nested, ax.Insert("empty", Res, key="k"), "the container is empty"),
    "a new lazy layer": (
        pair,
        ax.Insert("", functools.partial(nn.LazyLinear, 4)),
        r"LazyLinear\): it has lazy layers.*Write the sizes out",
    ),
    "a block without copies": (lambda: pair(Uncopied), ROOT, r"1 \(Uncopied\) cannot be copied: there is only one"),
    "a block that is its own copy": (lambda: pair(Single), KEEP, r"1 \(Single\) returns itself as its copy"),
    "a block whose copy does not run": (lambda: pair(Slots), ROOT, r"could not be planned \(AttributeError.*scale"),
    "a frozen source": (
        lambda: nn.Sequential(Res().requires_grad_(False), Res()),
        ax.Duplicate("", order=[0, 0, 1]),
        "nothing in it would train",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_and_untouched(name):
    make, edit, match = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    train(model, optimizer, X)
    before = picture(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, edit, optimizer, probe=X)
    assert_same(before, picture(model, optimizer))


@pytest.mark.parametrize("door", ["grow", "Grower", "surgery", "verify"])
def test_lazy_networks_are_asked_to_run_once(door):
    model = Lazy()
    match = r"out\.weight, out\.bias of lazy layers have no shape yet: run one batch through the model first"
    with pytest.raises(ax.GrowthError, match=match):
        if door == "grow":
            ax.grow(model, ax.Duplicate("blocks", by=1), probe=X)
        elif door == "Grower":
            ax.Grower(model, edits=ROOT, when=ax.when.every(1))
        elif door == "surgery":
            with ax.surgery(model):
                raise AssertionError("it should not come so far")
        else:
            ax.verify(model)
    model(X)
    ax.grow(model, ax.Duplicate("blocks", by=1), torch.optim.Adam(model.parameters()), probe=X)
    assert len(model.blocks) == 3


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(9, 4, sparse=True), pair()

        def forward(self, tokens):
            return self.blocks(self.embed(tokens).sum(1))

    torch.manual_seed(0)
    model, tokens = Words(), torch.randint(0, 9, (8, 3))
    optimizers = torch.optim.SparseAdam(list(model.embed.parameters())), torch.optim.Adam(model.blocks.parameters())
    edit = ax.Duplicate("blocks", by=1)
    grower = ax.Grower(model, *optimizers, edits=edit, when=ax.when.every(10**6), probe=tokens, keep=True)

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    assert model.embed.weight.grad.is_sparse
    before = picture(model, *optimizers)
    with grower.trial(edit):
        step()
    assert_same(before, picture(model, *optimizers))
    grower.grow(edit)
    step()
    grower.undo()
    assert_same(before, picture(model, *optimizers))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    grower.grow(edit)

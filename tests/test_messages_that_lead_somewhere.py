"""Refusals name what went wrong, and a call that works: the call that each of them names is run."""

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import auxin as ax
from auxin import GrowthError

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters())


class Silent(nn.Module):
    """Raises without a word: before it grows on a wide batch, and where it has three layers."""

    def __init__(self, error: type[Exception] = AssertionError):
        super().__init__()
        self.error, self.layers = error, nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.layers) > 2 or len(x) > 4:
            raise self.error
        for layer in self.layers:
            x = layer(x)
        return x


def square() -> nn.Module:
    return nn.Linear(8, 8)


@pytest.mark.parametrize("error", [AssertionError, NotImplementedError, RuntimeError])
def test_an_exception_without_words_is_named(error: type[Exception]) -> None:
    net, wide, name = Silent(error), torch.randn(5, 8), error.__name__
    edit = ax.Insert("layers", square, init="default")
    with pytest.raises(GrowthError, match=rf"layers\.2: the grown network does not run on the probe: {name}\. The new"):
        ax.grow(net, edit, adam(net), probe=X)
    with pytest.raises(GrowthError, match=rf"probe: Silent does not run on it: {name}\. Pass the batch"):
        ax.grow(net, edit, adam(net), probe=wide)
    with pytest.raises(GrowthError, match=rf"sites: Silent does not run on the probe: {name}\. Pass the batch"):
        ax.sites(net, wide)


def test_a_key_is_told_as_a_missing_key() -> None:
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, batch: Any) -> Tensor:
            return self.layer({"x": batch}["input"])

    with pytest.raises(GrowthError, match=r"Keyed does not run on it: KeyError: 'input'\."):
        ax.grow(net := Keyed(), ax.After("layer"), adam(net), probe=X)


def quiet() -> nn.Module:
    raise NotImplementedError


def test_a_factory_without_words_is_named() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(GrowthError, match=r"building it failed: NotImplementedError\. Write its arguments"):
        ax.grow(net, ax.Insert("", quiet), adam(net), probe=X)


class Scaled(nn.Module):
    """Its layers are called with a keyword."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(WithScale() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
        return x


class WithScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return x + scale * self.inner(x)


def test_a_keyword_is_not_told_as_a_width() -> None:
    net = Scaled()
    wording = (
        r"unexpected keyword argument 'scale'. It is called with 1 by position and scale=\.\.\.: give it a forward"
    )
    with pytest.raises(GrowthError, match=wording) as raised:
        ax.grow(net, ax.Insert("layers", square), adam(net), probe=X)
    assert "width" not in str(raised.value)
    with pytest.raises(
        GrowthError, match="its forward must take the arguments that the network calls it with"
    ) as by_hand:
        with ax.surgery(net, adam(net), probe=X):
            net.layers.append(square())
    assert "width" not in str(by_hand.value)
    ax.grow(net, ax.Insert("layers", WithScale), adam(net), probe=X)
    with ax.surgery(net, adam(net), probe=X):
        net.layers.append(WithScale())
    assert len(net.layers) == 4


class Listed(nn.Module):
    """Returns what each layer returns."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            found.append(x)
        return found


def test_outputs_of_each_layer_without_hidden_states() -> None:
    net = Listed()
    with pytest.raises(GrowthError, match=r"3 tensors instead of 2.*If that is wanted pass outputs=True\.") as raised:
        ax.grow(net, ax.Insert("layers", square, init="default"), adam(net), probe=X)
    assert "hidden_states" not in str(raised.value)
    ax.grow(net, ax.Insert("layers", square, init="default", outputs=True), adam(net), probe=X)
    wording = r"4 tensors instead of 3.*add the layer inside `with auxin\.surgery\(model, optimizer, probe=batch\):`\."
    with pytest.raises(GrowthError, match=wording) as copied:
        ax.grow(net, ax.Duplicate("layers", by=1, output="keep"), adam(net), probe=X)
    assert "hidden_states" not in str(copied.value)
    with ax.surgery(net, adam(net), probe=X):
        net.layers.append(square())
    assert len(net(X)) == 4


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], behind: str):
        super().__init__()
        self.behind, self.rnn = behind, kind(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2) if behind != "a Sequential" else nn.Sequential(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(x)[0][:, -1]
        return x if self.behind == "nothing" else self.head(x)


class Behind(nn.Module):
    def __init__(self, rnn: nn.Module):
        super().__init__()
        self.rnn, self.layer = rnn, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        x, state = self.rnn(x)
        return self.layer(x), state


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("behind", ["a Linear", "a Sequential", "nothing"])
def test_a_module_without_modules_inside(kind: type[nn.Module], behind: str) -> None:
    model = Recurrent(kind, behind)
    optimizer, batch, layer = adam(model), X, nn.Linear(8, 8)
    with pytest.raises(GrowthError, match=rf"A {kind.__name__} runs no module inside") as raised:
        ax.grow(model, ax.After("rnn"), optimizer, probe=batch)
    told = str(raised.value)
    assert "Choose a module inside" not in told
    if behind == "a Sequential":
        call = re.search(r"takes its output: (Insert\(.*\))\.$", told)
        assert call is not None
        assert call[1] == "Insert('head', layer, index=0)"
        ax.grow(model, ax.Insert("head", square, index=0), optimizer, probe=batch)
    elif behind == "a Linear":
        block = re.search(r"`with auxin\.surgery\(model, optimizer, probe=batch\): (.*)`\.$", told)
        assert block is not None
        kept = dict(model.named_parameters())["head.weight"]
        with ax.surgery(model, optimizer, probe=batch):
            exec(block[1], {"torch": torch, "model": model, "layer": layer})
        assert model.get_parameter("head.1.weight") is kept
    else:
        assert "Write a module that holds it and the layer" in told
        with ax.surgery(model, optimizer, probe=batch):
            model.rnn = Behind(model.rnn)
    ax.verify(model, optimizer)


class Inner(nn.Module):
    """Returns a tuple, and runs modules inside."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), x


def test_a_module_with_modules_inside() -> None:
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0])

    net = Net()
    with pytest.raises(GrowthError, match=r"returns a tuple.*Choose a module inside it"):
        ax.grow(net, ax.After("inner"), adam(net), probe=X)
    ax.grow(net, ax.After("inner.one"), adam(net), probe=X)


def linear() -> nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())


def convolution() -> nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU())


def convolution_in_time() -> nn.Module:
    return torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3, padding=1), torch.nn.ReLU())


FLAT = {
    "an MLP": (
        lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
        linear,
        X,
    ),
    "a convolutional network": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        convolution,
        torch.randn(2, 3, 9, 9),
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_sequential(name: str) -> None:
    make, layer, batch = FLAT[name]
    torch.manual_seed(0)
    net = make()
    with pytest.raises(GrowthError, match="A flat Sequential holds no blocks to copy") as raised:
        ax.grow(net, ax.Duplicate("", by=1), adam(net), probe=batch)
    told = re.search(r"`def layer\(\): return (.*)` and Insert\('', layer, index=(\d+)\)\.", str(raised.value))
    assert told is not None
    assert repr(eval(told[1], {"torch": torch})) == repr(layer())
    assert "output='keep' would run" not in str(raised.value)
    before = net(batch)
    change = ax.grow(net, ax.Insert("", layer, index=int(told[2])), adam(net), probe=batch)
    assert change.preserves
    torch.testing.assert_close(net(batch), before)


def test_a_flat_sequential_of_convolutions_that_ends_with_something_else() -> None:
    net, batch = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.GELU()), torch.randn(2, 3, 9)
    with pytest.raises(GrowthError, match=r"Sequential\(torch.nn.Conv1d\(4, 4, 3, padding=1\), torch.nn.ReLU\(\)\)"):
        ax.grow(net, ax.Duplicate("", by=1), adam(net), probe=batch)
    assert ax.grow(net, ax.Insert("", convolution_in_time, index=2), adam(net), probe=batch).preserves


class Unpacked(nn.Module):
    def __init__(self, named: bool):
        super().__init__()
        self.named, self.layers = named, nn.ModuleList(block(named) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for entry in self.layers:
            first, second = (entry["first"], entry["second"]) if self.named else entry
            x = x + second(torch.relu(first(x)))
        return x


def block(named: bool) -> nn.Module:
    if named:
        return nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8)})
    return nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])


@pytest.mark.parametrize("named", [False, True])
def test_a_layer_inside_a_block_that_forward_takes_apart(named: bool) -> None:
    net = Unpacked(named)
    edit = ax.Insert("layers.0", square, key="third" if named else None, init="default")
    wording = (
        r"layers\.0 is an entry of layers: Duplicate\('layers', by=1\) or Insert\('layers', layer\) adds a whole one"
    )
    with pytest.raises(GrowthError, match=wording) as raised:
        ax.grow(net, edit, adam(net), probe=X)
    assert "width" not in str(raised.value)
    ax.grow(net, ax.Duplicate("layers", by=1), adam(net), probe=X)
    ax.grow(net, ax.Insert("layers", functools.partial(block, named)), adam(net), probe=X)
    assert len(net.layers) == 4


def test_a_part_where_a_whole_block_belongs() -> None:
    net = Unpacked(False)
    wording = r"does not take what arrives there: .*calls the parts of what stands there: build it of such parts\."
    with pytest.raises(GrowthError, match=wording):
        ax.grow(net, ax.Insert("layers", square), adam(net), probe=X)

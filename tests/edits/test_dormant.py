"""A sleeping layer: it costs nothing, loses nothing, and is counted as lost by no one."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from sleepers import PLACES, InSequential, Plain, bits, inputs, train
from torch import nn

import auxin as ax

KINDS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "Adamax": {"lr": 0.01, "weight_decay": 0.1},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05, "weight_decay": 0.1},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    "Rprop": {"lr": 0.01},
    "ASGD": {"lr": 0.05, "t0": 1, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.1},
    "Muon": {"lr": 0.01, "weight_decay": 0.1},
    "SparseAdam": {"lr": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 2},
}
MODES = {
    "SGD": ("foreach", "fused"),
    "Adam": ("foreach", "fused"),
    "AdamW": ("foreach", "fused"),
    "Adagrad": ("foreach", "fused"),
}
OPTIMIZERS = [(kind, mode) for kind in KINDS for mode in ("plain", *MODES.get(kind, ()))]


class Bare(nn.Module):
    """Matrices only, for Muon."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(10, 20, bias=False), nn.Linear(20, 4, bias=False)
        self.extra = ax.Dormant(nn.Linear(20, 20, bias=False))

    def forward(self, x):
        return self.head(torch.tanh(self.extra(torch.tanh(self.first(x)))))


class Looked(nn.Module):
    """Sparse gradients only, for SparseAdam."""

    def __init__(self):
        super().__init__()
        self.first = nn.Embedding(9, 4, sparse=True)
        self.extra = ax.Dormant(nn.Embedding(9, 4, sparse=True))

    def forward(self, x):
        index = (x[:, 0].abs() * 4).long().clamp(max=8)
        found = self.extra(index)
        return self.first(index) + (found if found.is_floating_point() else 0)


def build(kind, mode="plain", trainable_only=False):
    model = {"Muon": Bare, "SparseAdam": Looked}.get(kind, Plain)()
    held = [p for p in model.parameters() if p.requires_grad or not trainable_only]
    flags = {} if mode == "plain" else {mode: True}
    return model, getattr(torch.optim, kind)(held, **KINDS[kind], **flags)


def test_every_optimizer_of_torch_is_in_the_list():
    known = {n for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"Optimizer"}
    assert known == set(KINDS)


@pytest.mark.parametrize("trainable_only", [False, True])
@pytest.mark.parametrize(("kind", "mode"), OPTIMIZERS)
def test_fifty_steps_leave_it_as_it_was(kind, mode, trainable_only):
    model, optimizer = build(kind, mode, trainable_only)
    before, first = {n: bits(p) for n, p in model.extra.named_parameters()}, bits(model.first.weight)
    state = {p: repr(optimizer.state[p]) for p in model.extra.parameters() if p in optimizer.state}
    assert not state or kind == "Adagrad"  # which makes empty state for all that it is given
    train(model, optimizer, 50)
    assert {n: bits(p) for n, p in model.extra.named_parameters()} == before and bits(model.first.weight) != first
    assert {p: repr(optimizer.state[p]) for p in model.extra.parameters() if p in optimizer.state} == state
    assert all(p.grad is None and not p.requires_grad for p in model.extra.parameters())
    ax.verify(model, optimizer)


def test_a_gradient_from_before_would_have_decayed_it():
    """Why the constructor drops gradients: an optimizer steps whatever has one, also zeros, also frozen."""
    layer = nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    optimizer.zero_grad(set_to_none=False)
    layer.requires_grad_(False)
    before = bits(layer.weight)
    optimizer.step()
    assert bits(layer.weight) != before
    layer.weight.grad = torch.ones(4, 4)
    ax.Dormant(layer)
    before = bits(layer.weight)
    optimizer.step()
    assert bits(layer.weight) == before


@pytest.mark.parametrize("network", PLACES)
def test_the_network_is_the_one_without_it(network):
    model = network()
    x = inputs()
    expected = model(x)
    at = PLACES[network]
    model.get_submodule(at).layer.register_forward_hook(lambda *_: pytest.fail("a sleeping layer ran"))
    assert torch.equal(model(x), expected)
    assert f"{at}.layer.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [((1, 2), {}, 1), ((1,), {"mask": 3}, 1), ((), {"hidden": 4, "mask": 3}, 4)],
)
def test_forward_returns_the_first_argument(args, kwargs, expected):
    assert ax.Dormant(nn.Linear(2, 2))(*args, **kwargs) is expected


def test_verify_counts_it_as_lost_only_once_it_is_awake():
    model = Plain()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    ax.verify(model, optimizer)
    model.requires_grad_(True)  # as people unfreeze a whole network: it still cannot learn, and is not lost
    ax.verify(model, optimizer)
    model.extra = model.extra.layer
    with pytest.raises(ax.GrowthError, match=r"extra\.weight \(20, 20\) is in no optimizer"):
        ax.verify(model, optimizer)


def test_a_tensor_tied_to_a_living_layer_is_named():
    model = Plain(width=4, out=4)
    model.extra = ax.Dormant(model.head)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ax.GrowthError, match=r"is frozen because the Dormant layer extra holds it too"):
        ax.verify(model, optimizer)
    model.head.requires_grad_(True)
    ax.verify(model, optimizer)


def test_it_is_copied_pickled_exported_and_in_the_state_dict():
    model = Plain()
    x = inputs()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    other = Plain()
    other.load_state_dict(model.state_dict())
    for twin in (*twins, other):
        assert torch.equal(twin(x), expected) and twin.extra.trainable == ("weight", "bias")
        assert not any(p.requires_grad for p in twin.extra.parameters())
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), expected)


def test_batch_norm_dropout_and_recurrent_layers_sleep_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(10, 20)
            self.norm = ax.Dormant(nn.Sequential(nn.BatchNorm1d(20), nn.Dropout(0.5)))
            self.rnn = ax.Dormant(nn.LSTM(20, 20))

        def forward(self, x):
            out = self.rnn(self.norm(self.first(x)))
            return out[0] if isinstance(out, tuple) else out

    model = Mixed()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    state = torch.random.get_rng_state()
    before = [bits(t) for t in (*model.norm.parameters(), *model.norm.buffers(), *model.rnn.parameters())]
    train(model, optimizer, 3, average)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [bits(t) for t in (*model.norm.parameters(), *model.norm.buffers(), *model.rnn.parameters())] == before
    for at in ("norm", "rnn"):
        ax.grow(model, ax.Wake(at), optimizer, average, probe=inputs())
    train(model, optimizer, 3, average)
    assert bits(model.norm[0].running_mean) != before[2] and bits(model.rnn.weight_ih_l0) != before[5]
    ax.verify(model, optimizer, average)


def test_an_average_of_it_stays_what_it_is():
    model = Plain()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    train(model, torch.optim.AdamW(model.parameters()), 20, average)
    assert bits(average.module.extra.layer.weight) == bits(model.extra.layer.weight)


def test_a_layer_inserted_beside_it_is_not_frozen():
    model = InSequential()
    model.net[0], model.net[3] = nn.Conv1d(10, 20, 1), nn.Identity()  # the only Linear left sleeps
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    edit = ax.Insert("net", partial(nn.Linear, 5, 5), index=2, init="default")
    ax.grow(model, edit, optimizer, probe=torch.randn(3, 10, 5))
    assert model.net[2].weight.requires_grad
    ax.verify(model, optimizer)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: "a layer", r"layer is a str; pass a ready module: Dormant\(nn\.Linear\(20, 40\)\)"),
        (lambda: nn.Linear, "layer is a type; pass a ready module"),
        (lambda: ax.Dormant(nn.Linear(2, 2)), "is dormant already; wrap the layer itself, once"),
        (lambda: nn.LazyLinear(4), "has lazy layers"),
    ],
)
def test_refusals(layer, words):
    with pytest.raises(ax.GrowthError, match=words):
        ax.Dormant(layer())

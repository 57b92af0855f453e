"""``init(module, site)``: a start of one's own that looks at what arrives, at the evidence, at output gradients."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import auxin as ax
from auxin.anatomy.probe import PlanContext
from auxin.init import InitSite
from auxin.journal import Journal, replay
from auxin.refs import Allowed

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
Y = X.sin().sum(1, keepdim=True)
SEEN: list[InitSite] = []


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.fc, self.drop = nn.Linear(width, width), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.fc(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build():
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


EVIDENCE = ax.Evidence(loss, [(X, Y), (X[:3] + 1, Y[:3])])
LINEAR = functools.partial(nn.Linear, 8, 8)


def note(module, site):
    """Takes note of what the site shows, and promises nothing."""
    _ = site.output_gradients
    SEEN.append(site)


def against(module, site):
    """The rank-one step against the gradient, from zero."""
    gradient, value = torch.cat(site.output_gradients), torch.cat(site.values)
    with torch.no_grad():
        module.weight.copy_(-0.1 * gradient.T @ value)
        module.bias.zero_()


def silent(module, site):
    """Zeros: behind a residual sum they change nothing."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return True


def boastful(module, site):
    """Promises what it does not keep."""
    return "preserves"


def talkative(module, site):
    return torch.ones(1)


def old_form(module, gain=3.0):
    with torch.no_grad():
        module.weight.fill_(gain)


def by_keyword(module, *, site):
    with torch.no_grad():
        module.weight.fill_(float(len(site.inputs)))


def other_names(m, s):
    with torch.no_grad():
        m.weight.fill_(float(len(s.values)))


def expected_gradients(model, tap, given, run):
    """The obvious twin: hook the place, run, backward."""
    model.eval()
    kept = []

    def before(_, args):
        kept.append(args[0].clone())
        kept[0].retain_grad()
        return kept[0]

    def after(_, args, output):
        kept.append(output.clone())
        kept[0].retain_grad()
        return kept[0]

    handle = tap.register_forward_pre_hook(before) if given else tap.register_forward_hook(after)
    run().backward()
    handle.remove()
    model.zero_grad()
    model.train()
    return kept[0].detach(), kept[0].grad


PLACES = {
    "insert in the middle": (lambda i: ax.Insert("blocks", Block, index=1, init=i), lambda m: (m.blocks[1], True)),
    "insert at the end": (lambda i: ax.Insert("blocks", Block, init=i), lambda m: (m.blocks[1], False)),
    "insert in front": (lambda i: ax.Insert("blocks", Block, index=0, init=i), lambda m: (m.blocks[0], True)),
    "after": (lambda i: ax.After("blocks.0.fc", LINEAR, init=i), lambda m: (m.blocks[0].fc, False)),
    "replace": (lambda i: ax.Replace("stem.1", nn.ReLU, init=i), lambda m: (m.stem[1], False)),
    "duplicate": (lambda i: ax.Duplicate("blocks", order=[0, 0, 1], content="fresh", init=i),
                  lambda m: (m.blocks[0], False)),
    "duplicate and keep": (lambda i: ax.Duplicate("blocks", order=[0, 1, 1], content="fresh", init=i, output="keep"),
                           lambda m: (m.blocks[1], False)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_values_and_gradients_are_those_of_a_plain_backward(name):
    edit, tap = PLACES[name]
    for evidence in (None, EVIDENCE):
        model, optimizer = build()
        SEEN.clear()
        grads = [p.grad for p in model.parameters()]
        buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
        ax.grow(model, edit(note), optimizer, probe=X, evidence=evidence)
        assert [p.grad for p in model.parameters()][: len(grads)] == grads and torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
        (site,) = SEEN
        assert len(site.output_gradients) == len(site.values) == (1 if evidence is None else 2)
        twin, _ = build()
        module, given = tap(twin)
        if evidence is None:

            def run(twin=twin):
                out = twin(X)
                weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
                return (out * weights).sum()

            runs = [run]
        else:
            runs = [functools.partial(loss, twin, batch) for batch in EVIDENCE.batches]
        for value, gradient, one in zip(site.values, site.output_gradients, runs, strict=True):
            wanted = expected_gradients(twin, module, given, one)
            assert torch.allclose(value, wanted[0], atol=1e-6) and torch.allclose(gradient, wanted[1], atol=1e-6)
        assert site.path in dict(model.named_modules()) and site.evidence is evidence
        assert len(site.inputs) == 1 and isinstance(site.seed, int)


def test_a_gradient_looking_init_lowers_the_loss_under_a_grower_and_is_not_asked_in_a_replay(tmp_path):
    def grower():
        model, optimizer = build()
        edit = ax.Insert("stem", LINEAR, index=1, init=against)
        return model, ax.Grower(model, optimizer, edits=edit, when=ax.when.at([1]), probe=X, evidence=EVIDENCE)

    model, first = grower()
    change = first.step(1.0)
    assert change is not None and change.how == "against" and not change.preserves
    again, second = grower()
    second.step(1.0)
    assert torch.equal(model.stem[1].weight, again.stem[1].weight) and model.stem[1].weight.any()
    ax.save(first, tmp_path / "run")
    loaded, third = grower()
    ax.load(tmp_path / "run", third)
    assert torch.equal(loaded.stem[1].weight, model.stem[1].weight)
    data = json.loads(json.dumps(first.journal.to_json()))
    fresh = Net()
    journal = Journal.from_json(data, Allowed.of(fresh, [against]))
    assert journal.entries[0].edit.init is against
    replay(fresh, data, allow=[against])
    fresh.load_state_dict(model.state_dict())
    model.eval(), fresh.eval()
    assert torch.equal(fresh(X), model(X))


def test_a_replay_does_not_call_it():
    model, _ = build()
    SEEN.clear()
    journal = Journal()
    journal.record(model, ax.grow(model, ax.Insert("blocks", Block, init=note), probe=X))
    assert len(SEEN) == 1
    replay(Net(), journal)
    with torch.device("meta"):
        replay(Net(), journal)
    assert len(SEEN) == 1


def test_a_promise_is_proved():
    model, optimizer = build()
    model.eval()
    before = model(X)
    change = ax.grow(model, ax.Insert("blocks", Block, init=silent), optimizer, probe=X)
    assert change.preserves and change.how == "silent" and torch.equal(model(X), before)
    change = ax.grow(
        model, ax.Duplicate("blocks", by=1, content="fresh", init=silent, output="keep"), optimizer, probe=X
    )
    assert change.preserves and torch.equal(model(X), before)
    names = list(model.state_dict())
    with pytest.raises(ax.GrowthError, match="outputs changed by .* though boastful was to keep them"):
        ax.grow(model, ax.Insert("stem", LINEAR, init=boastful), optimizer, probe=X)
    with pytest.raises(ax.GrowthError, match="init=talkative returned tensor.*Return True"):
        ax.grow(model, ax.Insert("stem", LINEAR, init=talkative), optimizer, probe=X)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(
    ("init", "value"),
    [
        (old_form, 3.0),
        (functools.partial(old_form, gain=2.0), 2.0),
        (by_keyword, 1.0),
        (other_names, 1.0),
        (nn.init.ones_, None),
    ],
)
def test_the_two_forms_are_told_apart_by_their_signature(init, value):
    model, optimizer = build()
    if value is None:  # torch's own take a tensor
        with pytest.raises(ax.GrowthError, match="could not be planned"):
            ax.grow(model, ax.Insert("stem", LINEAR, init=init), optimizer, probe=X)
        return
    ax.grow(model, ax.Insert("stem", LINEAR, init=init), optimizer, probe=X)
    assert bool((model.stem[2].weight == value).all())


def test_without_a_probe_the_evidence_will_do_and_without_both_it_is_refused():
    model, optimizer = build()
    ax.grow(model, ax.Insert("stem", LINEAR, init=against), optimizer, evidence=EVIDENCE)
    assert model.stem[2].weight.any()
    with pytest.raises(ax.GrowthError, match=r"no loss to take them of. Pass evidence=Evidence"):
        ax.grow(model, ax.Insert("stem", LINEAR, init=against), optimizer)
    blind = ax.Evidence(lambda model, batch: batch.square().mean(), [X])
    with pytest.raises(ax.GrowthError, match="batch 0 the loss does not depend on what stands at stem.3"):
        ax.grow(model, ax.Insert("stem", LINEAR, init=against), optimizer, evidence=blind)


def test_init_of_duplicate_by_name_and_where_it_does_not_belong():
    model, optimizer = build()
    tied = model.head.weight
    ax.grow(model, ax.Duplicate("blocks", by=1, content="fresh", init="kaiming", output="keep"), optimizer, probe=X)
    assert model.head.weight is tied and not model.blocks[2].fc.bias.any()
    for words in ({"init": "kaiming"}, {"content": "fresh", "init": "preserve"}):
        with pytest.raises(ax.GrowthError, match="init= says how weights are drawn with content='fresh'"):
            ax.grow(model, ax.Duplicate("blocks", **words), optimizer, probe=X)
    with pytest.raises(ax.GrowthError, match="init='kaimin' is not known"):
        ax.grow(model, ax.Duplicate("blocks", content="fresh", init="kaimin"), optimizer, probe=X)


class Tied(Block):
    """A block one of whose weights is the network's own."""

    def __init__(self, weight):
        super().__init__()
        self.fc.weight = weight


def test_a_fresh_copy_leaves_what_it_shares_with_the_network():
    shared = nn.Parameter(torch.randn(8, 8))
    holder = nn.ModuleDict({"blocks": nn.Sequential(Tied(shared), Tied(shared))})
    before = shared.detach().clone()
    edit = ax.Duplicate("blocks", by=1, content="fresh", init=old_form_of_blocks, output="keep")
    change = edit.plan(holder, PlanContext(holder))
    assert torch.equal(shared, before) and bool((change.added[0][1].module.fc.bias == 5).all())


def old_form_of_blocks(block):
    with torch.no_grad():
        block.fc.weight.fill_(5.0)
        block.fc.bias.fill_(5.0)

"""Evidence, choosers and edits that cannot be worked with are refused, and every byte of the run is as before."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import auxin as ax
from auxin import choose, when

X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4
EDITS = [ax.Widen("0", by=n) for n in (1, 2, 3)]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def built(evidence, lr=0.1, **words):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    words = {"edits": EDITS, "when": when.every(1), "probe": X, "evidence": evidence} | words
    return net, ax.Grower(net, optimizer, **words)


def of(net, grower):
    found = copy.deepcopy([net.state_dict(), grower.companions[0].state_dict(), torch.get_rng_state()])
    return found, [p.grad for p in net.parameters()], grower.journal.to_json() if len(grower.journal) else None


def same(a, b):
    (mine, *rest), (theirs, *others) = a, b
    tensors = [[x for part in one for x in torch.utils._pytree.tree_leaves(part)] for one in (mine, theirs)]
    return rest == others and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*tensors, strict=True)
    )


def refused(match, evidence, **words):
    net, grower = built(evidence, **words)
    before = of(net, grower)
    with pytest.raises(ax.GrowthError, match=match):
        grower.step(1.0)
    assert same(of(net, grower), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


BAD = {
    "nan": (
        ax.Evidence(lambda m, b: loss(m, b) * float("nan"), [(X, Y)]),
        "Evidence, batch 0: the loss is nan. Leave that batch out",
    ),
    "infinite where it is judged": (
        ax.Evidence(loss, [(X, Y)], validation=[(X * 1e38, Y)]),
        "the loss is (inf|nan). Leave that batch out",
    ),
    "another device": (
        ax.Evidence(loss, [(X.to("meta"), Y.to("meta"))]),
        "tensors on meta, the network is on cpu: move it there",
    ),
    "no gradient": (
        ax.Evidence(lambda m, b: loss(m, b).detach(), [(X, Y)]),
        "the loss has no gradient.*detach",
    ),
    "not a scalar": (ax.Evidence(lambda m, b: m(b[0]), [(X, Y)]), r"the loss is a tensor of shape \(64, 4\); return a"),
}


@pytest.mark.parametrize("chooser", [choose.by_gain(), choose.by_race(least=2), choose.by_trial(steps=2)], ids=repr)
@pytest.mark.parametrize("name", BAD)
def test_choosers_refuse_evidence(name, chooser):
    evidence, match = BAD[name]
    refused(match, evidence, choose=chooser)


def test_a_race_that_only_diverges_is_not_gone_on_with():
    refused("every branch is not finite", ax.Evidence(loss, [(X, Y)]), lr=1e30, choose=choose.by_race(least=5))


def test_a_race_that_only_diverges_is_paid_for():
    _, grower = built(ax.Evidence(loss, [(X, Y)]), lr=1e30)
    with pytest.raises(ax.GrowthError, match="every branch is not finite"):
        grower.race([EDITS[0]], steps=5)
    assert grower.ledger.flops["races"] > 0 and grower.ledger.flops["training"] == 0


@pytest.mark.parametrize("given", [itertools.repeat(EDITS[0]), lambda model: itertools.repeat(EDITS[0])])
def test_edits_that_never_end(given):
    with pytest.raises(ax.GrowthError, match="more than 10,000 edits and may never end; pass a list"):
        built(None, edits=given)


def test_a_chooser_that_asks_itself_never_ends():
    def asks(edits, grower):
        return grower.step(1.0)

    refused(r"called grower.step or grower.decide.*never end.*with grower.trial\(edit\):", None, choose=asks)


def test_where_hooks_cannot_fire_weights_from_data_come_all_the_same():
    found = []
    for compiled in (False, True):
        net, _ = built(None)
        run = torch.compile(net, backend="eager") if compiled else net
        run(X)
        ax.grow(run, ax.Widen("0", by=2, init="tiny"), probe=X, evidence=ax.Evidence(loss, [(X, Y)]))
        found.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert found[0]["0.weight"].shape == (7, 6)

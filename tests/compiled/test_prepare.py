"""``grower.prepare``: after it a growth compiles nothing, and nothing else has changed. Graphs are counted."""

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from compiling import Block, Graphs, Net, as_written, batch, step
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map_only

import auxin as ax

COPY = ax.Duplicate("blocks", by=1)


def outer(model, backend):
    return torch.compile(model, backend=backend)


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def function(model, backend):
    return torch.compile(lambda x: model(x), backend=backend)


def block_wise(model, backend):
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def as_it_is(model, backend):
    return model


class Trained:
    """A network in training; `compiled` says how, by a backend that counts."""

    def __init__(self, compiled=outer, optimizer=torch.optim.AdamW, backend=None, depth=2, **options):
        torch.compiler.reset()
        torch.manual_seed(1)
        self.model, self.graphs = Net(depth=depth), Graphs()
        self.call = compiled(self.model, self.graphs if backend is None else backend)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        given = self.call if isinstance(self.call, nn.Module) else self.model
        self.grower = ax.Grower(given, self.optimizer, edits=COPY, when=ax.when.at([]), probe=batch(), **options)
        self.losses = []
        self.train(3)

    def train(self, steps=1):
        self.losses += [step(self.call, self.optimizer) for _ in range(steps)]
        self.optimizer.zero_grad()

    def prepare(self, edit=COPY):
        return self.grower.prepare(edit, lambda: step(self.call, self.optimizer))


def losses_without(edit, steps, between=0):
    """Of a run that is neither compiled nor prepared."""
    run = Trained(as_it_is)
    run.train(between)
    run.grower.grow(edit)
    run.train(steps)
    return run.losses


def new_graphs_without(compiled, edit):
    """What the growth compiles where it was not prepared."""
    run = Trained(compiled)
    before = len(run.graphs)
    run.grower.grow(edit)
    run.train(2)
    return len(run.graphs) - before


EDITS = [
    COPY,
    ax.Insert("blocks", partial(Block, 16, 48), index=1),
    ax.Repeat("blocks", blocks=(0, 1)),
    ax.Widen("blocks.0.up", by=8),
    [COPY, ax.Widen("inp", by=4)],
    ax.After("blocks.0.up", partial(nn.Linear, 32, 32), init="default", as_hook=True),
]


@pytest.mark.parametrize("edit", EDITS, ids=["copy", "insert", "repeat", "widen", "two edits", "hook"])
def test_a_prepared_growth_compiles_nothing(edit):
    run = Trained()
    done = run.prepare(edit)
    assert done.graphs >= 1 and not done.again and f"{done.graphs} graph" in str(done)
    before = len(run.graphs)
    run.train(1)
    run.grower.grow(edit)
    run.train(4)
    assert len(run.graphs) == before
    assert run.losses == losses_without(edit, 4, between=1)


@pytest.mark.parametrize("compiled, stalls", [(in_place, 1), (function, 1), (block_wise, 0)])
def test_however_it_is_compiled(compiled, stalls):
    assert new_graphs_without(compiled, COPY) == stalls
    run = Trained(compiled)
    assert run.prepare().graphs == stalls
    before = len(run.graphs)
    run.grower.grow(COPY)
    run.train(3)
    assert len(run.graphs) == before
    assert run.losses == losses_without(COPY, 3)


def test_blocks_of_another_width_are_prepared_too():
    edit = ax.Widen("blocks.0.up", by=8)
    run = Trained(block_wise)
    assert run.prepare(edit).graphs == 1
    run.grower.grow(edit)
    run.train(2)
    assert len(run.graphs) == 2


def test_the_backward_is_compiled_too():
    def compiled():
        return counters["aot_autograd"]["total"], counters["frames"]["total"], counters["stats"]["unique_graphs"]

    run = Trained(backend="aot_eager", depth=1)
    before = compiled()
    run.prepare()
    prepared = compiled()
    assert all(now == then + 1 for now, then in zip(prepared, before, strict=True))
    run.grower.grow(COPY)
    run.train(3)
    assert compiled() == prepared


@pytest.mark.parametrize("compiled", [outer, block_wise])
def test_a_fade_in_is_prepared_to_its_end(compiled):
    """One graph with gates and one without them; the first gate also lets torch compile again what is there."""
    edit = ax.Repeat("blocks", blocks=(0, 1), fade=3)
    run = Trained(compiled)
    assert run.prepare(edit).graphs >= 2
    before = len(run.graphs)
    run.train(1)
    assert len(run.graphs) == before
    run.grower.grow(edit)
    run.train(5)
    assert len(run.graphs) == before and not any("gate" in name for name in run.model.state_dict())
    assert run.losses == losses_without(edit, 5, between=1)


def test_evidence_takes_the_step_through_what_the_grower_was_given():
    evidence = ax.Evidence(lambda model, x: (model(x) - 1).square().mean(), [batch()])
    run = Trained(evidence=evidence)
    assert run.grower.prepare(COPY).graphs == 1
    run.grower.grow(COPY)
    run.train(3)
    assert len(run.graphs) == 2 and run.losses == losses_without(COPY, 3)


def test_the_growth_after_the_next_is_prepared_inside_a_trial():
    run = Trained()
    with run.grower.trial(COPY):
        run.prepare()
    before = len(run.graphs)
    assert before == 3 and len(run.model.blocks) == 2
    for _ in range(2):
        run.grower.grow(COPY)
        run.train(2)
    assert len(run.graphs) == before and len(run.model.blocks) == 4


def test_nothing_of_the_trial_is_kept():
    run = Trained()
    seen = []

    def watched():
        seen.extend(weakref.ref(part) for block in run.model.blocks for part in (block, *block.parameters()))
        step(run.call, run.optimizer)

    run.grower.prepare(COPY, watched)
    gc.collect()
    own = {id(part) for block in run.model.blocks for part in (block, *block.parameters())}
    left = [ref() for ref in seen if ref() is not None and id(ref()) not in own]
    assert len(seen) > len(own) and not left
    assert not run.grower.rollback._branches


class Companions:
    """As written, with everything that could be left different."""

    def __init__(self):
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Dropout(0.1), Net())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=60)
        self.average = AveragedModel(self.model, use_buffers=True)
        self.scaler = torch.amp.GradScaler("cpu")
        companions = (self.optimizer, self.schedule, self.average, self.scaler)
        edits = ax.Duplicate("1.blocks", by=1)
        self.grower = ax.Grower(self.model, *companions, edits=edits, when=ax.when.at([]), probe=batch())
        self.losses = []
        self.train(4)

    def train(self, steps):
        for _ in range(steps):
            loss = (self.model(torch.randn(4, 8)) - 1).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.schedule.step()
            self.average.update_parameters(self.model)
            self.losses.append(loss.item())

    def state(self):
        """Bits, counts and identities, with tensors as copies."""
        parts = self.model, self.average, self.optimizer, self.schedule, self.scaler, self.grower
        tensors = [(p.data_ptr(), p.grad, p.requires_grad) for p in self.model.parameters()]
        hooks = [len(m._forward_hooks) for m in self.model.modules()], len(self.optimizer._optimizer_step_post_hooks)
        held = [id(m) for m in self.model.modules()], [id(p) for p in self.optimizer.param_groups[0]["params"]]
        state = [part.state_dict() for part in parts], tensors, hooks, held, torch.get_rng_state()
        return tree_map_only(torch.Tensor, torch.clone, state)


def assert_same(found, expected):
    """The same bits of all tensors, and equal values otherwise."""
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_everything_is_as_before_and_goes_on_alike():
    plain, run = Companions(), Companions()
    gradients = [p.grad for p in run.model.parameters()]
    before, count = run.state(), len(run.losses)
    done = run.grower.prepare(ax.Duplicate("1.blocks", by=1), lambda: run.train(1))
    assert done.graphs == 0 and "nothing to compile" in str(done)
    assert_same(run.state(), before)
    assert all(a is b for a, b in zip((p.grad for p in run.model.parameters()), gradients, strict=True))
    del run.losses[count:]
    random = torch.get_rng_state()
    for one in (plain, run):
        torch.set_rng_state(random)
        one.grower.grow(ax.Duplicate("1.blocks", by=1))
        one.train(6)
    assert run.losses == plain.losses
    for name in ("model", "average", "optimizer", "schedule", "scaler"):
        assert_same(getattr(run, name).state_dict(), getattr(plain, name).state_dict())


def test_a_compiled_optimizer_step_is_compiled_again_and_named():
    momentum = partial(torch.optim.SGD, momentum=0.9, foreach=True)
    run, theirs = Trained(as_it_is, momentum, depth=1), Graphs()
    run.optimizer.step = torch.compile(run.optimizer.step, backend=theirs)
    run.train(2)
    with pytest.warns(UserWarning, match=r"compiled again at the growth: SGD\.step.*compiled after each growth"):
        done = run.prepare()
    assert done.again == ("SGD.step",)
    before = len(theirs)
    run.grower.grow(COPY)
    run.train(2)
    assert len(theirs) > before


def test_nothing_is_warned_of_where_all_is_prepared():
    run = Trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.prepare()


def unchanged(run, edit, message, **words):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    graphs = len(run.graphs)
    with pytest.raises(ax.GrowthError, match=message):
        run.grower.prepare(edit, **words)
    assert len(run.model.blocks) == 2 and len(run.graphs) == graphs
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert not run.grower.rollback._branches and not run.grower.rollback.in_branch


def never():
    raise AssertionError("nothing takes a step")


@pytest.mark.parametrize(
    "edit, words, message",
    [
        (COPY, {}, r"pass prepare\(edit, step=f\).*evidence=auxin.Evidence\(loss, batches\)"),
        (COPY, {"step": 3}, r"step=3\): pass step\(\), which takes one training step"),
        (None, {"step": never}, r"prepare\(None\): pass the edit that is to come"),
        ("blocks", {"step": never}, r"prepare\('blocks'\): pass the edit"),
        (ax.Duplicate("nowhere"), {"step": never}, "nowhere"),
    ],
    ids=["no step", "a number", "nothing", "a path", "no such place"],
)
def test_bad_input_changes_nothing(edit, words, message):
    unchanged(Trained(), edit, message, **words)


def test_compiled_code_that_the_evidence_would_not_run_is_named():
    evidence = ax.Evidence(lambda model, x: (model(x) - 1).square().mean(), [batch()])
    run = Trained(function, evidence=evidence)
    unchanged(run, COPY, r"compiled code runs through .* auxin.Grower\(torch.compile\(model\), ...\)")


def test_gradients_that_no_step_has_used_are_waited_for():
    run = Trained()
    (run.call(batch()) - 1).square().mean().backward()
    with pytest.raises(ax.GrowthError, match="not now"):
        run.prepare()
    assert len(run.model.blocks) == 2


def test_a_step_that_raises_leaves_everything_as_it_was():
    run = Trained()

    def broken():
        step(run.call, run.optimizer)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.grower.prepare(COPY, broken)
    run.grower.grow(COPY)
    run.train(2)
    assert run.losses == losses_without(COPY, 2)
    assert torch.equal(run.call(batch()), as_written(run.model, batch()))

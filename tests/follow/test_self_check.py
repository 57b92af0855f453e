"""Optimizers that keep what their steps depend on elsewhere than per parameter are told, and refused, on a toy."""

import copy
import random
import sys
from collections import OrderedDict, defaultdict

import pytest
import torch
from growing import Net, assert_same, batch, picture, train
from torch.optim import Optimizer

import auxin as ax
from auxin.follow import self_check
from auxin.testing import check

EDIT = ax.Duplicate("blocks", by=1)


class Momentum(Optimizer):
    """As it should be: its state is per parameter, made at the first step."""

    built = 0

    def __init__(self, params, lr=1e-2, beta=0.9, **more):
        type(self).built += 1
        super().__init__(params, {"lr": lr, "beta": beta, **more})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for place, p in enumerate(group["params"]):
                if p.grad is not None:
                    self.move(group, p, place)
            self.after(group)
        return loss

    def move(self, group, p, place):
        self.walk(group, p, self.state[p])

    def walk(self, group, p, state):
        state["steps"] = state.get("steps", 0) + 1
        state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
        p.sub_(state["m"], alpha=group["lr"] / (1 - group["beta"] ** state["steps"]))

    def after(self, group):
        pass


class CountsInItsGroup(Momentum):
    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta, k=0)

    def move(self, group, p, place):
        m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
        p.sub_(m, alpha=group["lr"] / (1 - group["beta"] ** (group["k"] + 1)))

    def after(self, group):
        group["k"] += 1


class CountsATensorInItsGroup(CountsInItsGroup):
    def after(self, group):
        group["k"] = torch.as_tensor(group["k"]) + 1


class SumsWeightsInItsGroup(Momentum):
    """An average over time, of which the group knows how long it has been."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta, weight_sum=0.0)

    def move(self, group, p, place):
        p.sub_(p.grad, alpha=group["lr"] * 0.25 / (0.25 + group["weight_sum"]))

    def after(self, group):
        group["weight_sum"] += 0.25


class CountsInItself(CountsInItsGroup):
    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta)
        self.number = 0

    def after(self, group):
        self.number += 1
        group["k"] = self.number


class CountsInItsClass(CountsInItsGroup):
    number = 0

    def after(self, group):
        type(self).number += 1

    def move(self, group, p, place):
        group["k"] = self.number
        super().move(group, p, place)


class KeepsStateByPlace(Momentum):
    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta)
        self.places = {}

    def move(self, group, p, place):
        self.walk(group, p, self.places.setdefault(place, {}))


class KeepsStateInItsClass(Momentum):
    shared = {}

    def move(self, group, p, place):
        self.walk(group, p, self.shared.setdefault(p, {}))


class Around(Optimizer):
    """Stands around another optimizer, whose groups it shares and whose state it leaves where it is."""

    def __init__(self, base, k=5):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.k, self.counted = base, k, 0
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)

    def step(self, closure=None):
        return self.base.step(closure)

    def state_dict(self):
        return self.base.state_dict()

    def load_state_dict(self, state):
        self.base.load_state_dict(state)
        self.param_groups = self.base.param_groups


class AroundWithItsState(Optimizer):
    """Stands around another one, shares its groups and its state, and asks for a closure."""

    def __init__(self, params, base=torch.optim.AdamW, **options):
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure=None):
        if closure is None:
            raise ValueError("asks for a closure")
        with torch.enable_grad():
            closure()
        self.base.step()


class AroundOtherGroups(AroundWithItsState):
    """Stands around another one that has groups of its own, which nobody grows."""

    def __init__(self, params, base=torch.optim.AdamW, **options):
        params = list(params)
        Optimizer.__init__(self, params, options)
        self.base = base(params, **options)


class KeepsFromTheStart(Around):
    """Stands around another one and keeps something of each parameter from when it is built, so no toy of it steps."""

    def __init__(self, base):
        super().__init__(base)
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    def step(self, closure=None):
        loss = self.base.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.slow[p].lerp_(p.detach(), 0.5)
        return loss


class DecaysByTheMeanOfAll(Momentum):
    """How fast weights decay depends on how many there are, which is little beside a step."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        mean = sum(g.square().sum() for g in grads) / sum(g.numel() for g in grads)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p, alpha=float(1e-4 * group["lr"] / mean.sqrt()))
        super().step()
        return None if closure is None else loss


class RaisesAtZero(Momentum):
    def walk(self, group, p, state):
        if not state and not p.grad.any():
            raise ValueError("the gradient is all zeros, set scale=0.1")
        super().walk(group, p, state)


class Flat(Momentum):
    """Keeps flat vectors beside its momentum, and a scale for all that it learns as it goes."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta, d=1e-3)

    def walk(self, group, p, state):
        state.setdefault("p0", p.flatten()[::3].clone())
        state.setdefault("s", torch.zeros_like(state["p0"])).add_(p.grad.flatten()[::3])
        before = state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
        p.sub_(before, alpha=group["d"])

    def after(self, group):
        group["d"] *= 1.7


class WantsAClosure(Momentum):
    def step(self, closure):
        return super().step(closure)


class KeepsStateByName(Momentum):
    """It asks for names, so that no toy can be built."""

    def __init__(self, named, lr=1e-2):
        self.names = {p: name for name, p in named}
        super().__init__(list(self.names), lr)
        self.moments = {}

    def move(self, group, p, place):
        self.walk(group, p, self.moments.setdefault(self.names[p], {}))


def of(kind, model):
    if kind is KeepsStateByName:
        return kind(model.named_parameters())
    if issubclass(kind, Around):
        return kind(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return kind(model.parameters())


def ready(kind, **hooks):
    ax.follow(kind, like=torch.optim.AdamW, **hooks)
    torch.manual_seed(0)
    model = Net()
    optimizer = of(kind, model)
    if kind not in (AroundWithItsState, AroundOtherGroups):
        train(model, optimizer, 4)
    return model, optimizer


COUNTS = r"{} counts steps outside of state\[p\] \({}, so the first step of a new parameter would be another.*{}"
ANEW = r"Grow without it, auxin\.grow\(model, edit, probe=batch\), and build it from the grown network"
REFUSED = [
    (CountsInItself, COUNTS.format("CountsInItself", r"in .*optimizer\.number\)", ANEW)),
    (CountsInItsClass, COUNTS.format("CountsInItsClass", r"in .*\)", ANEW)),
    (
        KeepsStateByPlace,
        r"KeepsStateByPlace steps old parameters otherwise once a new one stands between.*by their place",
    ),
    (KeepsStateInItsClass, r"KeepsStateInItsClass does not go on as it did once it is saved and loaded.*Say what a ch"),
    (KeepsFromTheStart, r"KeepsFromTheStart stands around optimizer\.base, and takes no step on a toy.*" + ANEW),
    (KeepsStateByName, r"KeepsStateByName keeps parameters in optimizer\.names, and takes no step on a toy.*" + ANEW),
    (DecaysByTheMeanOfAll, r"DecaysByTheMeanOfAll steps old parameters otherwise.*reckons over all"),
    (RaisesAtZero, r"RaisesAtZero fails on a toy that grows.*the gradient is all zeros, set scale=0\.1"),
    (AroundOtherGroups, r"AroundOtherGroups .*so the first step of a new parameter would be another.*0\.00 times"),
    (Around, r"Around does not go on as it did once it is saved and loaded.*Pass optimizer\.base in its place, and"),
]


@pytest.mark.parametrize(("kind", "match"), REFUSED)
def test_refused_by_name_wherever_it_is_handed_over(kind, match):
    model, optimizer = ready(kind)
    before = picture(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, EDIT, optimizer, probe=batch()[0])
    with pytest.raises(ax.GrowthError, match=match):
        ax.verify(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.Grower(model, optimizer, edits=EDIT, when=ax.when.every(1))
    assert_same(before, picture(model, optimizer))


@pytest.mark.parametrize("kind", [Momentum, Flat, WantsAClosure])
def test_what_keeps_its_state_per_parameter_grows(kind):
    model, optimizer = ready(kind)
    ax.verify(model, optimizer)
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    ax.verify(model, optimizer)
    train(model, optimizer, 2)


def test_one_around_another_whose_state_it_shares():
    model, optimizer = ready(AroundWithItsState)

    def closure():
        optimizer.zero_grad()
        loss = model(batch()[0]).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    ax.grow(model, ax.Widen("blocks.*.up", by=2), optimizer, probe=batch()[0])
    optimizer.step(closure)
    assert all(p in optimizer.base.state for p in model.parameters())


def test_leaves_no_trace():
    hits = []
    listening = sys.modules[Optimizer.__module__].register_optimizer_step_post_hook(lambda *_: hits.append(1))
    model, optimizer = ready(CountsInItsClass)
    states = torch.get_rng_state(), random.getstate(), CountsInItsClass.number, Momentum.built
    hits.clear()
    for _ in range(2):
        with pytest.raises(ax.GrowthError, match="CountsInItsClass counts"):
            ax.verify(model, optimizer)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (CountsInItsClass.number, Momentum.built, hits) == (*states[2:], [])
    train(model, optimizer, 1)
    assert hits == [1]  # it listens again
    listening.remove()


def test_is_made_once_for_a_class_and_its_options(monkeypatch):
    tried = []
    trying = self_check._tried
    monkeypatch.setattr(self_check, "_tried", lambda *given: [tried.append(1), trying(*given)][1])
    model, optimizer = ready(Momentum)
    for _ in range(2):
        ax.verify(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-5  # a schedule has moved it
    ax.verify(model, optimizer)
    assert len(tried) == 2  # with matrices and with vectors
    ax.verify(model, Momentum(model.parameters(), beta=0.5))
    ax.verify(model, torch.optim.AdamW(model.parameters()))
    assert len(tried) == 4


def test_a_way_round_for_one_around_another():
    model, optimizer = ready(Around)
    ax.grow(model, EDIT, optimizer.base, probe=batch()[0])
    train(model, optimizer, 1)
    assert model.blocks[2].up.weight in optimizer.base.state


def test_a_way_round_that_says_what_a_checkpoint_holds(tmp_path):
    def load(optimizer, model, state):
        optimizer.base.load_state_dict(state["base"])
        optimizer.param_groups = optimizer.base.param_groups
        optimizer.counted = state["counted"]

    def save(optimizer, model):
        return {"base": optimizer.base.state_dict(), "counted": optimizer.counted}

    model, optimizer = ready(Around, save=save, load=load)
    optimizer.counted = 4
    options = {"edits": EDIT, "when": ax.when.every(10**9), "probe": batch()[0]}
    grower = ax.Grower(model, optimizer, **options)
    grower.grow(EDIT)
    train(model, optimizer, 2)
    ax.save(grower, tmp_path)
    fresh = Net()
    other = of(Around, fresh)
    ax.load(tmp_path, ax.Grower(fresh, other, **options))
    assert other.counted == 4 and len(other.base.state) == len(list(fresh.parameters()))
    train(model, optimizer, 3)
    train(fresh, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_follower_of_ones_own_is_trusted():
    model, optimizer = ready(CountsInItself)

    @ax.follow(CountsInItself)
    def keeps_step(optimizer, change):
        yield
        before = [list(group["params"]) for group in optimizer.param_groups]
        fresh = [p for p in change.after.values() if all(p is not old for held in before for old in held)]
        optimizer.add_param_group({"params": fresh, "k": 0})
        try:
            yield
        except Exception:
            del optimizer.param_groups[len(before) :]
            raise

    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    assert [group["k"] for group in optimizer.param_groups] == [4, 0]


def test_save_without_load():
    with pytest.raises(ax.GrowthError, match=r"follow\(.*Momentum.*\): pass save= and load= together"):
        ax.follow(Momentum, like=torch.optim.AdamW, save=lambda optimizer, model: copy.copy(optimizer.state))


def test_a_stale_state_of_an_unknown_optimizer_is_found_beside_a_flat_one():
    model, optimizer = ready(Flat)
    optimizer.state[model.head.weight]["m"] = torch.zeros(7, 8)
    with pytest.raises(ax.GrowthError, match=r"Flat: state 'm' \(7, 8\) of head\.weight \(1, 8\) has another shape"):
        ax.verify(model, optimizer)


# ---- steps that are counted in groups


def begun(optimizer, model, edit=EDIT, at="up", **words):
    """How far a weight of the copied block goes in its first step, over a fresh optimizer's."""
    change = ax.grow(model, edit, optimizer, probe=batch()[0], **words)
    twin = copy.deepcopy(model)
    fresh = of(type(optimizer), twin)
    far = []
    for one, stepping in ((model, optimizer), (twin, fresh)):
        weight = getattr(one.blocks[2], at).weight
        before = weight.detach().clone()
        for p in one.parameters():
            p.grad = torch.ones_like(p)
        stepping.step()
        stepping.zero_grad()
        far.append(float((weight.detach() - before).norm()))
    return change, far[0] / far[1]


class BeginsWhereItFirstSteps(CountsInItsGroup):
    """Its count is not there before the first step, and a flag says that it is."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super(CountsInItsGroup, self).__init__(params, lr, beta, ready=False)

    def move(self, group, p, place):
        if not group["ready"]:
            group["ready"], group["k"] = True, torch.tensor(0)
        super().move(group, p, place)


class StepsAsFarAsItsParameterIsLong(CountsInItsGroup):
    """A trust ratio hides what is counted, but where a parameter is zero."""

    def move(self, group, p, place):
        m = self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
        step = m / (1 - group["beta"] ** (group["k"] + 1))
        p.sub_(step, alpha=group["lr"] * float(p.norm() / step.norm() if p.any() and step.any() else 1))


class CountsForVectorsAlone(CountsInItsGroup):
    """Matrices are stepped by another rule."""

    def move(self, group, p, place):
        if p.dim() > 1:
            p.sub_(p.grad.sign(), alpha=group["lr"])
        else:
            super().move(group, p, place)


class StandsBesideWhereItIs(CountsInItsGroup):
    """Gradients are taken at a point that is much further away than a step is long."""

    def move(self, group, p, place):
        state = self.state[p]
        state.setdefault("z", p.clone())
        m = state.setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["beta"])
        state["z"].sub_(m, alpha=0.01 * group["lr"] / (1 - group["beta"] ** (group["k"] + 1)))
        p.copy_(state["z"] - 0.5 * m / m.norm().clamp(min=1e-8))


COUNTING = [
    CountsForVectorsAlone,
    StandsBesideWhereItIs,
    CountsInItsGroup,
    CountsATensorInItsGroup,
    SumsWeightsInItsGroup,
    BeginsWhereItFirstSteps,
    StepsAsFarAsItsParameterIsLong,
]


@pytest.mark.parametrize("at", ["up", "down"])
@pytest.mark.parametrize("kind", COUNTING)
def test_what_is_counted_in_a_group_begins_anew_in_a_group_of_its_own(kind, at):
    model, optimizer = ready(kind)
    old = list(optimizer.param_groups[0]["params"])
    change, share = begun(optimizer, model, at=at)
    assert share == pytest.approx(1, rel=1e-5)
    assert [held is p for held, p in zip(optimizer.param_groups[0]["params"], old, strict=True)]
    new = dict(model.blocks[1].named_parameters()), dict(model.blocks[2].named_parameters())
    assert len(optimizer.param_groups) == 2 and len(optimizer.param_groups[1]["params"]) == len(new[0])
    assert "own group 1" in str(change) and "counts its steps in its groups" in str(change)
    ax.verify(model, optimizer)


class KeepsMatricesAsLong(Momentum):
    """On a sphere, as HyperBall: what is zero stays so."""

    def move(self, group, p, place):
        long = p.norm()
        super().move(group, p, place)
        if p.dim() > 1:
            p.mul_(long / p.norm().clamp(min=1e-12))


def test_zeros_that_would_stay_at_zero():
    model, optimizer = ready(KeepsMatricesAsLong)
    before = picture(model, optimizer)
    with pytest.raises(
        ax.GrowthError, match=r"KeepsMatricesAsLong leaves tensors of zeros.*: blocks\.2\.down\.weight would"
    ):
        ax.grow(model, EDIT, optimizer, probe=batch()[0])
    with pytest.raises(ax.GrowthError, match=r"blocks\.2\.down\.weight would never train"):
        ax.grow(model, EDIT, optimizer, probe=batch()[0], group={"beta": 0.5})
    assert_same(before, picture(model, optimizer))
    ax.grow(model, ax.Duplicate("blocks", by=1, output="keep"), optimizer, probe=batch()[0])  # as it says
    was = model.blocks[2].down.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(was, model.blocks[2].down.weight)


def test_a_copied_state_goes_on_in_the_group_of_its_source():
    model, optimizer = ready(CountsInItsGroup)
    ax.grow(model, ax.Duplicate("blocks", by=1, state="copy"), optimizer, probe=batch()[0])
    zeroed = {id(p) for p in optimizer.param_groups[1]["params"]}
    names = {name for name, p in model.blocks[2].named_parameters() if id(p) in zeroed}
    assert names == {"down.weight", "down.bias"}
    assert [group["k"] for group in optimizer.param_groups] == [4, 0]


@pytest.mark.parametrize("kind", COUNTING)
def test_its_groups_are_undone_saved_and_loaded(kind, tmp_path):
    options = {"edits": EDIT, "when": ax.when.every(10**9), "probe": batch()[0]}
    model, optimizer = ready(kind)
    grower = ax.Grower(model, optimizer, **options)
    before = picture(model, optimizer)
    grower.grow(EDIT)
    grower.undo()
    assert_same(before, picture(model, optimizer))
    grower.grow(EDIT)
    train(model, optimizer, 2)
    ax.save(grower, tmp_path)
    fresh = Net()
    other = of(kind, fresh)
    ax.load(tmp_path, ax.Grower(fresh, other, **options))
    train(model, optimizer, 3)
    train(fresh, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert len(other.param_groups) == 2


def test_the_conformance_checks_know_its_groups():
    ax.follow(CountsInItsGroup, like=torch.optim.AdamW)
    check(Net(), EDIT, lambda model: CountsInItsGroup(model.parameters()), batch()[0], steps=3)


def test_a_schedule_goes_on_over_its_groups():
    model, optimizer = ready(CountsInItsGroup)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with pytest.raises(ax.GrowthError, match=r"a schedule drives this CountsInItsGroup.*Pass it too"):
        ax.grow(model, EDIT, optimizer, probe=batch()[0])
    ax.grow(model, EDIT, optimizer, schedule, probe=batch()[0], group={"lr": 2.5e-3})
    for _ in range(2):
        train(model, optimizer)
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [2.5e-3, 6.25e-4]


def test_two_kinds_of_groups_are_both_tried():
    class Two(CountsInItsGroup):
        def move(self, group, p, place):
            if group["plain"]:
                p.sub_(p.grad, alpha=group["lr"])
            else:
                super().move(group, p, place)

    ax.follow(Two, like=torch.optim.AdamW)
    model = Net()
    heavy = [p for p in model.parameters() if p.dim() > 1]
    light = [p for p in model.parameters() if p.dim() < 2]
    optimizer = Two([{"params": heavy, "plain": True}, {"params": light, "plain": False}])
    train(model, optimizer, 4)
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    assert optimizer.param_groups[-1]["k"] == 0 and not optimizer.param_groups[-1]["plain"]
    assert {p.dim() for p in optimizer.param_groups[-1]["params"]} == {1}


# ---- rates of a group of its own


class OneRate(Momentum):
    """Refuses groups of different rates, in its step."""

    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate for all groups")
        return super().step(closure)


class DeafToRates(Momentum):
    def walk(self, group, p, state):
        super().walk({**group, "lr": self.param_groups[0]["lr"]}, p, state)


class LeavesOutWhatIsAdded(Momentum):
    """Pairs its groups with a list from when it was built."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, lr, beta)
        self.rates = [group["lr"] for group in self.param_groups]

    def walk(self, group, p, state):
        if any(group is one for one, _ in zip(self.param_groups, self.rates, strict=False)):
            super().walk(group, p, state)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (LeavesOutWhatIsAdded, r"LeavesOutWhatIsAdded does not step a group that is added.*Leave group out"),
        (OneRate, r"OneRate does not step groups of different learning rates.*one rate for all groups.*Leave lr out"),
        (DeafToRates, r"DeafToRates takes no notice of the learning rate of a group beside its first one"),
    ],
)
def test_a_rate_that_would_wreck_the_run_or_change_nothing(kind, match):
    model, optimizer = ready(kind)
    before = picture(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, EDIT, optimizer, probe=batch()[0], group={"lr": 1e-3})
    assert_same(before, picture(model, optimizer))
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    train(model, optimizer, 1)


# ---- states that are more than tensors


class Factors(Momentum):
    """A list of matrices that follow the sides of a parameter; on a square one each has the parameter's shape."""

    def walk(self, group, p, state):
        sides = [torch.eye(size) for size in p.shape]
        state.setdefault("sides", sides)
        state.setdefault("left", sides[0].clone())
        for side in state["sides"]:
            side.mul_(0.9)
        super().walk(group, p, state)


@pytest.mark.parametrize("square", [False, True])
def test_factors_of_a_state_do_not_follow_a_width(square):
    model, optimizer = ready(Factors)
    if square:
        for p in list(optimizer.state):
            del optimizer.state[p]["sides"]
    with pytest.raises(ax.GrowthError, match=r"its state '(sides' \(a list of tensors\)|left' \(.*\)) of .* does not"):
        ax.grow(model, ax.Widen("blocks.*.up", by=4), optimizer, probe=batch()[0])
    ax.grow(model, EDIT, optimizer, probe=batch()[0])


def test_a_copied_list_of_tensors_is_its_own():
    model, optimizer = ready(Factors)
    ax.grow(model, ax.Duplicate("blocks", by=1, state="copy"), optimizer, probe=batch()[0])
    source, copied = (optimizer.state[model.blocks[k].up.weight]["sides"] for k in (1, 2))
    assert torch.equal(source[0], copied[0]) and source is not copied and source[0] is not copied[0]


class Pair(torch.Tensor):
    """A tensor made of two others, as quantized states are, whose class does not know how it is copied."""

    @staticmethod
    def __new__(cls, high, low):
        made = torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype)
        made.high, made.low = high, low
        return made

    def __tensor_flatten__(self):
        return ["high", "low"], {}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].high, args[0].low)
        raise NotImplementedError(f"Pair: {function}")


class InPairs(Momentum):
    def walk(self, group, p, state):
        if p.numel() < 40:  # too small to be worth it, as those of 8 bits say below 4,096
            super().walk(group, p, state)
            return
        held = state.setdefault("m", Pair(torch.zeros_like(p), torch.zeros_like(p)))
        held.high.lerp_(p.grad, 0.1)
        p.sub_(held.high + held.low, alpha=group["lr"])


def test_a_state_made_of_other_tensors():
    model, optimizer = ready(InPairs)
    held = optimizer.state[model.stem.weight]["m"]
    kept = held.high.clone()
    with pytest.raises(RuntimeError, match="taken back"), ax.surgery(model, optimizer):
        held.high.add_(1)
        raise RuntimeError("taken back")
    assert torch.equal(held.high, kept)
    with pytest.raises(ax.GrowthError, match=r"InPairs: its state of blocks.* cannot be copied \(NotImplementedErr"):
        ax.grow(model, ax.Duplicate("blocks", by=1, state="copy"), optimizer, probe=batch()[0])
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    train(model, optimizer, 1)


class KeepsAView(Momentum):
    """A view made without gradients, of a tensor that is then written into with them."""

    def walk(self, group, p, state):
        if "view" not in state:
            base = torch.zeros(4)
            state["view"] = base[:2]
            with torch.enable_grad():
                base.add_(torch.ones(4, requires_grad=True))
        super().walk(group, p, state)


def test_a_view_that_does_not_say_whether_it_is_a_leaf():
    model, optimizer = ready(KeepsAView)
    with pytest.raises(RuntimeError, match="modified inplace with grad mode"):
        bool(optimizer.state[model.stem.weight]["view"].is_leaf)
    with ax.surgery(model, optimizer):
        model.blocks.append(copy.deepcopy(model.blocks[0]))


class AsksForEveryGradient(Momentum):
    def move(self, group, p, place):
        assert p.grad is not None
        super().move(group, p, place)

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                with torch.no_grad():
                    p.sub_(self.state[p]["m"], alpha=group["lr"])


def test_one_that_asks_for_every_gradient():
    ax.follow(AsksForEveryGradient, like=torch.optim.AdamW)
    model = Net()
    optimizer = AsksForEveryGradient(model.parameters())
    ax.grow(model, EDIT, optimizer, probe=batch()[0])
    ax.verify(model, optimizer)

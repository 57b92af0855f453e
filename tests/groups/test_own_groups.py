"""What is in an own group, the way back from it, and what the journal knows of it."""

import copy
import functools

import pytest
import torch
from attacked import Run, assert_same, picture
from growing import Block, Net, batch, ema_of, train
from torch import nn
from torch.optim import lr_scheduler as lrs

import auxin as ax
from auxin.journal import Journal
from auxin.structure_history import StructureHistory

EDIT = ax.Duplicate("blocks", by=1)


def ready(kind=torch.optim.AdamW, groups=None, schedule=None, **options):
    torch.manual_seed(0)
    model = Net(depth=2)
    optimizer = kind(groups(model) if groups else model.parameters(), **{"lr": 0.1, **options})
    companions = [optimizer] if schedule is None else [optimizer, schedule(optimizer)]
    train(model, optimizer, 2)
    return model, optimizer, companions


def by_decay(model):
    heavy = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    light = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    return [
        {"params": light, "name": "light", "weight_decay": 0.0, "lr": 0.2},
        {"params": heavy, "name": "heavy", "weight_decay": 0.1},
    ]


# ---- what is in it


def test_every_option_is_the_donors_but_those_asked_for():
    model, optimizer, companions = ready(groups=by_decay, schedule=lambda o: lrs.OneCycleLR(o, [0.2, 0.1], 40))
    old = [dict(group) for group in optimizer.param_groups]
    change = ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.002, eps=1e-6, weight_decay=0.3))
    assert len(optimizer.param_groups) == 4 and [own.index for own in change.groups] == [2, 3]
    names = {"lr", "initial_lr", "max_lr", "min_lr"}
    for own, group in zip(change.groups, optimizer.param_groups[2:], strict=True):
        donor = old[own.donor]
        assert list(group) == list(donor)
        assert group["initial_lr"] == 0.002 and group["eps"] == 1e-6 and group["weight_decay"] == 0.3
        for key in names:
            assert group[key] == pytest.approx(donor[key] * 0.002 / donor["initial_lr"], rel=1e-15)
        for key in donor.keys() - names - {"params", "param_names", "eps", "weight_decay"}:
            assert group[key] == donor[key], key
        new = {id(p): n for n, p in model.named_parameters() if n.startswith("blocks.2.")}
        dims = {p.dim() for p in group["params"]}
        assert [new[id(p)] for p in group["params"]] == group["param_names"]
        assert dims == ({1} if own.donor == 0 else {2})
        assert [n for n, p in model.named_parameters() if n in group["param_names"]] == group["param_names"]


def test_the_change_says_which_groups_were_made():
    model, _, companions = ready(groups=by_decay)
    change = ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.01, weight_decay=0.3))
    assert "own group 2 of AdamW (lr 0.01, weight_decay 0.3; 0.05x the rate of group 0)" in str(change)
    assert "own group 3 of AdamW (lr 0.01, weight_decay 0.3; 0.1x the rate of group 1)" in str(change)
    change = ax.grow(model, EDIT, *companions, probe=batch()[0])
    assert change.groups == () and "own group" not in str(change)
    assert len(companions[0].param_groups) == 4  # beside its sibling, in the groups that are there


def test_without_a_rate_the_rates_are_the_donors():
    model, optimizer, companions = ready(schedule=lambda o: lrs.StepLR(o, 1, 0.5))
    companions[1].step()
    ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(weight_decay=0.0))
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05]
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.1, 0.1]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]


def test_without_a_schedule_the_rate_is_the_one_from_now_on():
    model, optimizer, companions = ready()
    optimizer.param_groups[0]["lr"] = 0.03
    ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.004))
    assert [g["lr"] for g in optimizer.param_groups] == [0.03, 0.004]


def test_a_second_growth_beside_the_first_gets_the_same_rate():
    model, optimizer, companions = ready(schedule=lambda o: lrs.LambdaLR(o, lambda step: 0.9**step))
    for _ in range(3):
        companions[1].step()
        ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.01))
    assert companions[1].base_lrs == [0.1, 0.01, 0.01, 0.01]
    assert [g["lr"] for g in optimizer.param_groups[2:]] == [optimizer.param_groups[1]["lr"]] * 2


def test_tensor_rates_stay_tensors_of_their_own():
    model, optimizer, companions = ready(
        lr=torch.tensor(0.1), foreach=False, schedule=lambda o: lrs.LambdaLR(o, lambda step: 0.9**step)
    )
    held = optimizer.param_groups[0]["lr"]
    ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.01))
    own = optimizer.param_groups[1]["lr"]
    assert isinstance(own, torch.Tensor) and own is not held and own.data_ptr() != held.data_ptr()
    rates = []
    for _ in range(20):
        train(model, optimizer, 1)
        companions[1].step()
        rates.append((float(held), float(own)))
    assert optimizer.param_groups[0]["lr"] is held and optimizer.param_groups[1]["lr"] is own
    assert all(new / old == pytest.approx(0.1, rel=1e-6) for old, new in rates)  # float32
    assert isinstance(companions[1].base_lrs[1], torch.Tensor) and companions[1].base_lrs[1] is not own


def test_a_tensor_or_another_librarys_number_may_be_asked_for():
    numpy = pytest.importorskip("numpy")
    for lr in (torch.tensor(0.25), numpy.float32(0.25), numpy.float64(0.25), 0.25):
        model, optimizer, companions = ready()
        change = ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=lr))
        assert type(optimizer.param_groups[1]["lr"]) is float and optimizer.param_groups[1]["lr"] == 0.25
        assert change.group == {"lr": 0.25} and type(change.group["lr"]) is float


def test_two_optimizers_get_a_group_each():
    torch.manual_seed(0)
    model = Net(depth=2)
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if not (n.startswith("blocks") and p.dim() == 2)]
    muon, adam = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.1)
    schedules = [lrs.CosineAnnealingLR(o, 30) for o in (muon, adam)]
    asked = dict(lr=0.005)
    change = ax.grow(model, EDIT, muon, adam, *schedules, probe=batch()[0], group=asked)
    assert [(type(own.optimizer), own.index, own.donor) for own in change.groups] == [
        (torch.optim.Muon, 1, 0),
        (torch.optim.AdamW, 1, 0),
    ]
    assert [p.dim() for p in muon.param_groups[1]["params"]] == [2, 2]
    assert [p.dim() for p in adam.param_groups[1]["params"]] == [1, 1, 1, 1]
    assert [s.base_lrs for s in schedules] == [[0.02, 0.005], [0.1, 0.005]]
    with pytest.raises(
        ax.GrowthError, match=r"group=dict\(betas=\.\.\.\) is not an option of an own group\. Muon has lr"
    ):
        ax.grow(model, EDIT, muon, adam, *schedules, probe=batch()[0], group=dict(betas=(0.8, 0.9)))


def test_muon_takes_matrices_only():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    muon = torch.optim.Muon(model.parameters(), lr=0.1)
    layer = functools.partial(nn.Linear, 3, 3)
    with pytest.raises(ax.GrowthError, match="Muon only takes matrices"):
        ax.grow(model, ax.Insert("", layer, init="default"), muon, group=dict(lr=0.01))
    assert len(muon.param_groups) == 1
    layer = functools.partial(nn.Linear, 3, 3, bias=False)
    ax.grow(model, ax.Insert("", layer, init="default"), muon, group=dict(lr=0.01))
    assert [g["lr"] for g in muon.param_groups] == [0.1, 0.01]


@pytest.mark.parametrize("fused", [False, True])
def test_sgd_goes_on_whatever_the_momentum_of_the_new_group(fused):
    for momentum, own in ((0.9, 0.5), (0.9, 0.0), (0.0, 0.9)):
        model, optimizer, companions = ready(torch.optim.SGD, lr=0.01, momentum=momentum, fused=fused)
        ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(momentum=own))
        before = copy.deepcopy(model.blocks[2])
        train(model, optimizer, 3)
        assert all(
            not torch.equal(a, b) for a, b in zip(before.parameters(), model.blocks[2].parameters(), strict=True)
        )
        assert [g["momentum"] for g in optimizer.param_groups] == [momentum, own]


def test_a_copied_state_serves_only_a_group_of_the_same_kind():
    edit = ax.Duplicate("blocks", by=1, output="keep", state="copy")
    model, optimizer, companions = ready()
    before = picture(model, *companions)
    match = r"made under amsgrad=False, which does not serve group=dict\(amsgrad=True\)\. Use state='fresh'"
    with pytest.raises(ax.GrowthError, match=match):
        ax.grow(model, edit, *companions, probe=batch()[0], group=dict(amsgrad=True))
    assert_same(before, picture(model, *companions))
    ax.grow(model, edit, *companions, probe=batch()[0], group=dict(lr=0.01))
    new, old = model.blocks[2].up.weight, model.blocks[1].up.weight
    assert torch.equal(optimizer.state[new]["exp_avg"], optimizer.state[old]["exp_avg"])
    train(model, optimizer, 2)


def test_average_and_scaler_are_as_they_were():
    model, _, companions = ready()
    average, scaler = ema_of(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    held = picture(scaler)
    ax.grow(model, EDIT, *companions, average, scaler, probe=batch()[0], group=dict(lr=0.01))
    assert_same(held, picture(scaler))
    ax.verify(model, *companions, average)
    assert len(average.module.blocks) == 3


def test_thawed_parameters_get_the_group_too():
    torch.manual_seed(0)
    model = Net(depth=2)
    model.stem.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ax.surgery(model, optimizer, group=dict(lr=0.01)):
        model.stem.requires_grad_(True)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in model.stem.parameters()]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_what_waited_frozen_in_a_group_leaves_it_for_its_own(named, trained):
    torch.manual_seed(0)
    model = Net(depth=2)
    optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters(), lr=0.1)
    schedule = lrs.StepLR(optimizer, 3, 0.5)
    if trained:
        train(model, optimizer, 2)
    model.stem.requires_grad_(False)
    old, new = list(model.parameters())[2:], list(model.stem.parameters())
    before = picture(model, optimizer, schedule)
    with pytest.raises(ZeroDivisionError), ax.surgery(model, optimizer, schedule, group=dict(lr=0.01)):
        model.stem.requires_grad_(True)
        raise ZeroDivisionError
    assert_same(before, picture(model, optimizer, schedule))
    held = [dict(optimizer.state.get(p, {})) for p in new]
    with ax.surgery(model, optimizer, schedule, group=dict(lr=0.01)):
        model.stem.requires_grad_(True)
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in ps] for ps in (old, new)]
    assert not named or optimizer.param_groups[1]["param_names"] == ["stem.weight", "stem.bias"]
    for p, state in zip(new, held, strict=True):
        assert {k: id(v) for k, v in optimizer.state.get(p, {}).items()} == {k: id(v) for k, v in state.items()}
    train(model, optimizer, 2)
    ax.verify(model, optimizer, schedule)


def test_a_waiting_state_serves_only_a_group_of_the_same_kind():
    model, optimizer, companions = ready()
    model.stem.requires_grad_(False)
    with pytest.raises(ax.GrowthError, match=r"made under amsgrad=False.*Drop it first: del optimizer\.state\[p\]"):
        with ax.surgery(model, *companions, group=dict(amsgrad=True)):
            model.stem.requires_grad_(True)
    for p in model.stem.parameters():
        del optimizer.state[p]
    with ax.surgery(model, *companions, group=dict(amsgrad=True)):
        model.stem.requires_grad_(True)
    train(model, optimizer, 2)


@pytest.mark.parametrize("waits", [False, True])
def test_a_layer_that_wakes_gets_its_own_group(waits, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), ax.Dormant(nn.Linear(5, 5)), nn.Linear(5, 1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if waits or p.requires_grad], lr=0.1)
        schedule = lrs.StepLR(optimizer, 3, 0.5)
        words = {"when": ax.when.every(10**6), "probe": batch()[0], "group": dict(lr=0.01)}
        return model, optimizer, schedule, ax.Grower(model, optimizer, schedule, edits=ax.Wake("1"), **words)

    model, optimizer, schedule, grower = build()
    train(model, optimizer, 2)
    grower.grow(ax.Wake("1"))
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 2]
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01]
    train(model, optimizer, 2)
    ax.save(grower, tmp_path)
    fresh = build()
    ax.load(tmp_path, fresh[3])
    for one, opt, sched, _ in ((model, optimizer, schedule, None), fresh):
        for _ in range(8):
            train(one, opt, 1)
            sched.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh[0].parameters(), strict=True))
    assert fresh[1].param_groups[1]["lr"] == optimizer.param_groups[1]["lr"] == 0.01 * 0.5**2


def test_a_surgery_without_new_parameters_makes_no_group():
    model, optimizer, companions = ready()
    with ax.surgery(model, *companions, group=dict(lr=0.01)) as done:
        model.blocks = nn.ModuleList(list(model.blocks)[:1])
    assert len(optimizer.param_groups) == 1 and done.change.groups == ()


# ---- the way back


def grown(run):
    return ax.grow(run.model, EDIT, *run.companions, probe=run.probe, group={"lr": 1e-3})


def test_what_fails_or_is_only_tried_leaves_no_trace():
    run = Run(group={"lr": 1e-3})
    run.steps(3)
    run.adam.zero_grad(), run.sgd.zero_grad()
    with run.grower.trial(None):
        pass
    before = run.picture()
    ax.grow(run.model, EDIT, *run.companions, probe=run.probe, group={"lr": 1e-3}, dry_run=True)
    assert_same(before, run.picture(), "dry run")
    with pytest.raises(ZeroDivisionError), ax.surgery(run.model, *run.companions, group={"lr": 1e-3}):
        run.model.tail.append(nn.Linear(7, 7))
        raise ZeroDivisionError
    assert_same(before, run.picture(), "surgery")
    with run.grower.trial(EDIT):
        assert len(run.adam.param_groups) == 4
        run.steps(6)
        with run.grower.trial(ax.Insert("tail", functools.partial(nn.Linear, 6, 6), index=1, init="identity")):
            assert len(run.sgd.param_groups) == 2
            run.steps(6)  # over the milestone of the sequence
    run.adam.zero_grad(), run.sgd.zero_grad()
    assert_same(before, run.picture(), "trial")
    run.grower.grow(EDIT)
    assert len(run.adam.param_groups) == 4
    run.grower.undo()
    assert_same(before, run.picture(), "undo")


@pytest.mark.parametrize("keep", [True, "disk"])
def test_undo_after_training_on(keep):
    alone = Run(keep=keep).steps(5 + 12)
    run = Run(group={"lr": 1e-3}, keep=keep)
    assert run.steps(5) == alone[:5]
    run.adam.zero_grad(), run.sgd.zero_grad()
    before = picture(run.model, *run.companions)
    run.grower.grow(EDIT)
    run.steps(7)
    assert len(run.adam.param_groups) == 4
    run.adam.zero_grad(), run.sgd.zero_grad()
    run.grower.undo()
    assert_same(before, picture(run.model, *run.companions))
    assert run.steps(12) == alone[5:]


@pytest.mark.parametrize("order", [1, -1])
def test_a_growth_that_also_widens_comes_back_from_a_checkpoint(order, tmp_path):
    """Of several edits as one, those that only resize have nothing for the own group."""

    def built():
        model, _, companions = ready(schedule=lambda o: lrs.ExponentialLR(o, 0.9))
        when = {"edits": EDIT, "when": ax.when.every(10**6), "probe": batch()[0]}
        grower = ax.Grower(model, *companions, group=dict(lr=0.01), **when)
        grower.history = StructureHistory()
        return grower

    def groups(grower):
        names = {id(p): name for name, p in grower.model.named_parameters()}
        return [[names[id(p)] for p in g["params"]] + [g["lr"]] for g in grower.optimizers[0].param_groups]

    grower, fresh = built(), built()
    before, old = grower.state_dict(), groups(grower)
    grower.grow([EDIT, ax.Widen("blocks.*.up", by=2)][::order])
    grown = groups(grower)
    assert len(grown) == 2 and grown[1][-1] == 0.01
    ax.save(grower, tmp_path)
    ax.load(tmp_path, fresh)
    assert groups(fresh) == grown
    after = grower.state_dict()
    grower.go_to(before)
    assert groups(grower) == old
    grower.go_to(after)
    assert groups(grower) == grown


def test_undo_after_the_schedule_has_stepped():
    """The last learning rates are another list by then."""
    model, optimizer, companions = ready(
        schedule=lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=5), lrs.ExponentialLR(o, 0.9)], [5])
    )
    grower = ax.Grower(model, *companions, edits=EDIT, when=ax.when.every(1), probe=batch()[0], group=dict(lr=0.01))
    schedule = companions[1]
    grower.grow(EDIT)
    schedule.step()
    assert len(schedule.get_last_lr()) == 2
    grower.undo()
    assert len(schedule.get_last_lr()) == 1 and len(optimizer.param_groups) == 1
    ax.verify(model, *companions)
    for _ in range(8):  # over the milestone
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]


def test_a_probation_takes_an_own_group_back():
    model, optimizer, companions = ready(schedule=lambda o: lrs.StepLR(o, 3, 0.5))
    grower = ax.Grower(
        model,
        *companions,
        edits=EDIT,
        when=ax.when.at([4]),
        probe=batch()[0],
        group=dict(lr=0.01),
        probation=ax.Probation(calls=3),
    )
    counts = []
    for number in range(12):
        train(model, optimizer, 1)
        companions[1].step()
        grower.step(1.0 / (number + 1) if number < 4 else 5.0 + number)
        counts.append(len(optimizer.param_groups))
    assert 2 in counts and counts[-1] == 1 and len(companions[1].base_lrs) == 1
    assert grower.undone[0]["group"] == {"lr": 0.01}


# ---- the journal


def linear(o):
    return lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, total_iters=6), lrs.CosineAnnealingLR(o, 30)], [6])


def grower_of(model, companions, **words):
    return ax.Grower(model, *companions, edits=EDIT, when=ax.when.every(10**6), probe=batch()[0], **words)


def test_the_journal_makes_the_same_groups_again():
    model, optimizer, companions = ready(groups=by_decay, schedule=linear)
    grower = grower_of(model, companions, group=dict(lr=0.01, betas=(0.8, 0.9)))
    grower.grow(EDIT)
    with grower.surgery():
        model.blocks.insert(0, Block())
    data = grower.journal.to_json()
    assert [entry.group for entry in grower.journal] == [{"lr": 0.01, "betas": (0.8, 0.9)}] * 2
    fresh, other, theirs = ready(groups=by_decay, schedule=linear)
    ax.replay(fresh, data, *theirs)
    assert len(other.param_groups) == len(optimizer.param_groups) == 6
    for mine, yours in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert mine["param_names"] == yours["param_names"] and mine["initial_lr"] == yours["initial_lr"]
        assert mine["betas"] == yours["betas"]
    assert [s.base_lrs for s in theirs[1]._schedulers] == [s.base_lrs for s in companions[1]._schedulers]
    ax.replay(Net(depth=2), data)  # no optimizer, no groups
    with torch.device("meta"):
        bare = Net(depth=2)
    assert len(ax.replay(bare, Journal(grower.journal.entries)).blocks) == 4


def test_a_growth_by_hand_is_recorded_with_its_group(tmp_path):
    model, optimizer, companions = ready(schedule=linear)
    grower = grower_of(model, companions)
    grower.record(ax.grow(model, EDIT, *companions, probe=batch()[0], group=dict(lr=0.01)))
    with ax.surgery(model, *companions, group=dict(weight_decay=0.5)) as done:
        model.blocks.append(Block())
    grower.record(done.change)
    grower.grow(EDIT)
    assert [entry.group for entry in grower.journal] == [{"lr": 0.01}, {"weight_decay": 0.5}, None]
    train(model, optimizer, 3)
    ax.save(grower, tmp_path)
    fresh, other, theirs = ready(schedule=linear)
    ax.load(tmp_path, grower_of(fresh, theirs))
    for one, opt, (_, schedule) in ((model, optimizer, companions), (fresh, other, theirs)):
        for _ in range(9):
            train(one, opt, 1)
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert len(other.param_groups) == 3


def test_a_checkpoint_is_loaded_into_the_run_that_wrote_it(tmp_path):
    """Also where the network looks as at its start: a tensor thawed, a layer replaced by one of the same shape."""
    model, optimizer, companions = ready(schedule=lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.5))
    model.stem.requires_grad_(False)
    grower = grower_of(model, companions, group=dict(lr=0.01))
    with grower.surgery():
        model.stem.requires_grad_(True)
    with grower.surgery():
        model.head = nn.Linear(8, 1)
    for metric in (1.0, 2.0, 3.0):
        train(model, optimizer, 1)
        companions[1].step(metric)
    ax.save(grower, tmp_path)
    ends = []
    for _ in range(2):
        ax.load(tmp_path, grower)
        assert [len(g["params"]) for g in optimizer.param_groups] == [12, 2, 2]
        train(model, optimizer, 4)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_what_takes_over_an_old_tensors_values_stays_in_its_group(tmp_path):
    """A larger table that begins with the old one, as a new Parameter; the replay knows no values."""
    model, optimizer, companions = ready(schedule=linear)
    grower = grower_of(model, companions, group=dict(lr=0.01))
    table = model.head.weight
    with grower.surgery():
        model.head.weight = nn.Parameter(torch.cat([table.data, torch.zeros(1, 8)]))
        model.head.bias = nn.Parameter(torch.ones(2))
        model.head.out_features = 2
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(list(model.parameters())) - 1, 1]
    train(model, optimizer, 2)
    ax.save(grower, tmp_path)
    fresh, other, theirs = ready(schedule=linear)
    ax.load(tmp_path, grower_of(fresh, theirs))
    for one, opt in ((model, optimizer), (fresh, other)):
        train(one, opt, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_plain_torch_loads_what_was_grown():
    """Groups are as `add_param_group` leaves them: `state_dict` and `load_state_dict` of torch serve."""
    model, optimizer, companions = ready(schedule=linear)
    grower = grower_of(model, companions, group=dict(lr=0.01))
    grower.grow(EDIT)
    train(model, optimizer, 2)
    for _ in range(3):
        companions[1].step()
    fresh, other, theirs = ready(schedule=linear)
    ax.replay(fresh, grower.journal, *theirs)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two share their state
    theirs[1].load_state_dict(companions[1].state_dict())
    for one, opt, (_, schedule) in ((model, optimizer, companions), (fresh, other, theirs)):
        for _ in range(9):
            train(one, opt, 1)
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("group", [[1], "lr", {"lr": None}, {"lr": "1"}, {}, {3: 4}, {"params": []}, True, 1.5])
def test_a_hostile_group_in_a_journal_is_refused(group):
    model, _, companions = ready(schedule=linear)
    grower = grower_of(model, companions, group=dict(lr=0.01))
    grower.grow(EDIT)
    entries = grower.journal.entries
    object.__setattr__(entries[0], "group", group)
    fresh, _, theirs = ready(schedule=linear)
    before = picture(fresh, *theirs)
    with pytest.raises(ax.GrowthError, match="growth 0 of the journal"):
        ax.replay(fresh, Journal(entries), *theirs)
    assert_same(before, picture(fresh, *theirs))


@pytest.mark.parametrize("own", [{"lr": 0.004}, 0, None])
def test_the_group_of_a_grower_does_not_stand_in_the_way_of_a_surgery_that_resizes(own, tmp_path):
    """It is for what is new as a whole; asked for in this one surgery it is refused."""
    built = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        edit = ax.Insert("", functools.partial(nn.Linear, 4, 4), index=1, init="identity")
        words = {"edits": edit, "when": ax.when.every(10**6), "probe": torch.randn(5, 3), "group": own}
        built.append(ax.Grower(model, optimizer, **words))

    def one_more():
        last = model[2]
        last.weight.data = torch.cat([last.weight.data, torch.zeros(1, 4)])
        last.bias.data = torch.cat([last.bias.data, torch.zeros(1)])
        last.out_features = 3

    grower, model, optimizer = built[0], built[0].model, built[0].companions[0]
    with grower.surgery():
        one_more()
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["lr"] == 0.01
    grower.verify()
    ax.save(grower, tmp_path)
    ax.load(tmp_path, built[1])
    assert built[1].model[2].out_features == 3
    grower.grow(edit)
    assert len(optimizer.param_groups) == 1 + isinstance(own, dict)
    if own is not None:
        with pytest.raises(ax.GrowthError, match="Leave group out"), ax.surgery(model, optimizer, group=own):
            model[3].weight.data = torch.cat([model[3].weight.data, torch.zeros(1, 4)])
            model[3].bias.data = torch.cat([model[3].bias.data, torch.zeros(1)])
            model[3].out_features = 4


@pytest.mark.parametrize("group", [0, {"lr": 1e-3}])
def test_a_grower_with_a_group_carries_out_an_edit_that_only_resizes(group):
    """Its group is for what is new as a whole; what gets wider stays where it is, and a journal replays."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    net, x = build(), torch.randn(5, 4)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    edit = ax.Widen("0", by=2)
    grower = ax.Grower(net, opt, edits=edit, when=ax.when.every(10**6), probe=x, group=group)
    grower.grow(edit)
    assert len(opt.param_groups) == 1 and net[0].out_features == 8
    twin = build()
    ax.replay(twin, grower.journal, torch.optim.AdamW(twin.parameters(), lr=1e-2))
    assert twin[0].weight.shape == (8, 4)

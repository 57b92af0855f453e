"""``verdict``: it judges what a full run would show, costs a tenth at most, and leaves nothing behind."""

import copy
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import auxin as ax
from auxin.cli import main
from auxin.extrapolate import DRAWS, Curve, Past, Point, forecasts, foreseen
from auxin.ledger import flops_of
from auxin.pilots import Parts, finer, finest, part_of, samples_in


def build(width: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    return net, torch.optim.Adam(net.parameters(), lr=1e-2)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return mse_loss(model(batch[0]), batch[1])


def evidence(size: int = 32) -> ax.Evidence:
    """A product, which two units cannot learn."""
    x = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, :1] * x[:, 1:2]) + x[:, 2:3]
    batches = [*zip(x.split(size), y.split(size), strict=True)]
    return ax.Evidence(loss, batches[:16], validation=batches[16:])


@pytest.fixture(scope="module")
def old() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, optimizer = build(2)
    evidence().train(model, [optimizer], 300)
    return model, optimizer


def budget(model: nn.Module, steps: int) -> float:
    return steps * flops_of(model, loss, evidence().batches[0])


def state(*held: Any) -> list[Any]:
    """Everything of networks, optimizers and averages, and the random generators."""
    kept: list[Any] = [copy.deepcopy(one.state_dict()) for one in held]
    kept += [[id(p) for p in one.parameters()] for one in held if isinstance(one, nn.Module)]
    return [*kept, torch.get_rng_state(), random.getstate()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ways(width: int = 8) -> dict[str, Any]:
    return {"edits": ax.Widen("0", by=6), "anew": lambda: build(width), "evidence": evidence()}


Old = tuple[nn.Sequential, torch.optim.Optimizer]


def test_it_finds_out_that_a_network_is_too_small_and_leaves_nothing_behind(old: Old) -> None:
    model, optimizer = old
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    torch.manual_seed(5)
    for p in model.parameters():  # as a loop leaves them
        p.grad = torch.full_like(p, 0.5)
    gradients = [p.grad for p in model.parameters()]
    before = state(model, optimizer, average, schedule)
    told = ax.verdict(model, optimizer, average, schedule, **ways(), budget=budget(model, 3000))
    assert same(before, state(model, optimizer, average, schedule))
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(bool((gradient == 0.5).all()) for gradient in gradients)
    optimizer.zero_grad()
    assert [plan.name for plan in told.plans] == ["go on", "grow", "start anew"]
    assert told.best.name != "go on" and told.plans[0].best < 0.1
    assert 0 < told.price <= 0.1 * told.budget and told.price == sum(told.spent.values())
    assert told.plans[1].parameters == told.plans[2].parameters > told.plans[0].parameters
    assert told.plans[0].steps == 3000 > told.plans[1].steps


def test_it_ends_early_when_it_is_sure(old: Old) -> None:
    model, optimizer = old
    steps = budget(model, 3000)
    told = ax.verdict(model, optimizer, anew=lambda: build(8), evidence=evidence(), budget=steps, sure=0.5)
    assert told.rounds == 1 and told.winner == told.best.name and told.price < 0.03 * told.budget


def test_where_nothing_differs_it_says_so(old: Old) -> None:
    model, optimizer = old
    alike = [ax.Widen("0", by=6), ax.Widen("0", by=7)]
    told = ax.verdict(model, optimizer, edits=alike, evidence=evidence(), budget=budget(model, 1000), sure=0.99)
    assert told.winner == "no difference" and told.edit is None and 0 < told.sure < 0.99
    assert told.rounds and told.price > 0.05 * told.budget
    assert "no difference that is sure" in str(told) and "*" not in str(told)


def test_a_budget_too_small_for_pilots_says_that(old: Old) -> None:
    model, optimizer = old
    told = ax.verdict(model, optimizer, **ways(), budget=budget(model, 5))
    assert told.winner == "no difference" and told.rounds == 0 and told.sure == 0
    assert "pays for fewer than" in str(told) and "Judge a larger budget" in str(told)
    assert json.loads(json.dumps(told.to_json()))["plans"][0]["expected"] is None


def test_what_it_prints(old: Old) -> None:
    model, optimizer = old
    told = ax.verdict(model, optimizer, **ways(), budget=budget(model, 3000), sure=0.5)
    lines = str(told).splitlines()
    assert [line.startswith("*") for line in lines[1:4]] == [plan is told.best for plan in told.plans]
    assert "Widen('0', by=6)" in lines[2] and f"{told.plans[1].parameters:,}" in lines[2]
    assert lines[4].startswith(f"{told.winner}: ") and "below the next best, sure to" in lines[4]
    assert lines[5].startswith("price: ") and f"{told.price / told.budget:.1%} of the budget" in lines[5]
    plain = json.loads(json.dumps(told.to_json()))
    assert plain["winner"] == told.winner and plain["price"] == told.price and len(plain["plans"]) == 3


def test_a_grower_is_judged_as_it_stands_and_its_ledger_counts(old: Old) -> None:
    model, optimizer = old
    edits, held = ax.Widen("0", by=6), evidence()
    probe = held.batches[0][0]
    grower = ax.Grower(model, optimizer, edits=edits, when=ax.when.every(1), evidence=held, probe=probe)
    before = state(model, optimizer)
    told = ax.verdict(grower, anew=lambda: build(8), budget=budget(model, 1000))
    assert same(before, state(model, optimizer)) and not grower.journal and grower.calls == 0
    assert grower.ledger.total == pytest.approx(told.price) and grower.ledger.flops["races"] == told.spent["races"]
    with pytest.raises(ax.GrowthError, match="of its own"):
        ax.verdict(grower, edits=edits, budget=budget(model, 1000))


def test_a_step_of_ones_own_is_taken(old: Old) -> None:
    model, optimizer = old
    taken: list[nn.Module] = []

    def stepping(own: torch.optim.Optimizer) -> Callable[[nn.Module, Any], None]:
        def step(network: nn.Module, batch: Any) -> None:
            taken.append(network)
            own.zero_grad()
            loss(network, batch).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            own.step()

        return step

    def anew() -> tuple[Any, ...]:
        network, own = build(8)
        return network, own, stepping(own)

    held = ax.Evidence(loss, evidence().batches, evidence().validation, step=stepping(optimizer))
    before = state(model, optimizer)
    told = ax.verdict(model, optimizer, anew=anew, evidence=held, budget=budget(model, 1000))
    assert same(before, state(model, optimizer)) and told.rounds
    assert model in taken and any(network is not model for network in taken)
    with pytest.raises(ax.GrowthError, match="Return a step too"):
        ax.verdict(model, optimizer, anew=lambda: build(8), evidence=held, budget=budget(model, 1000))


def diverging(size: int) -> ax.Evidence:
    held = evidence(size)
    batches = [*held.batches[:1], *[(x, y * math.nan) for x, y in held.batches[1:]]]
    return ax.Evidence(loss, batches, held.validation)


def wrong_outputs() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return net, torch.optim.Adam(net.parameters())


def no_data() -> None:
    raise ValueError("no data here")


def another_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    return build(8)[0], build(8)[1]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"evidence": None}, "judges on data that training does not see"),
    ({"evidence": ax.Evidence(loss, [(torch.ones(4, 4), torch.ones(4, 1))])}, "validation=batches"),
    ({"evidence": ax.Evidence(lambda m, b: loss(m, b) * math.inf, evidence().batches, evidence().batches)}, "is inf"),
    ({"evidence": diverging(32), "edits": ()}, "the loss of every way became infinite or NaN"),
    ({"evidence": ax.Evidence(lambda m, b: loss(m, b) - 9, evidence().batches, evidence().batches)}, "losses below 0"),
    ({"budget": 10.0}, "below one training step of the largest network"),
    ({"budget": 0}, "pass FLOPs"),
    ({"budget": "many"}, "pass FLOPs"),
    ({"sure": 1.0}, "pass a probability"),
    ({"edits": (), "anew": None}, "there is nothing to compare with"),
    ({"edits": ax.Widen("2", by=1)}, "2"),
    ({"edits": ax.Duplicate("nowhere", by=1)}, "nowhere"),
    ({"anew": wrong_outputs}, "its outputs have the shapes"),
    ({"anew": no_data}, "it does not build: no data here"),
    ({"anew": lambda: build(8)[0]}, "Return the larger network and its optimizer"),
    ({"anew": another_optimizer}, "trains no parameter of its network"),
    ({"rewarmed": 3}, "rewarmed"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_does_not_fit_is_refused_and_nothing_is_changed(old: Old, number: int) -> None:
    model, optimizer = old
    given, message = BAD[number]
    before = state(model, optimizer)
    with pytest.raises(ax.GrowthError, match=message):
        ax.verdict(model, optimizer, **{**ways(), "budget": budget(model, 1000), **given})
    assert same(before, state(model, optimizer))


def test_a_network_anew_that_shares_weights_is_refused(old: Old) -> None:
    model, optimizer = old
    before = state(model, optimizer)
    with pytest.raises(ax.GrowthError, match="'0.weight' is a parameter of the network that is there"):
        ax.verdict(model, optimizer, evidence=evidence(), anew=lambda: (model, optimizer), budget=budget(model, 1000))
    assert same(before, state(model, optimizer))


def test_without_an_optimizer_or_a_rate_nothing_is_judged(old: Old) -> None:
    model, _ = old
    with pytest.raises(ax.GrowthError, match="pass an optimizer"):
        ax.verdict(model, **ways(), budget=budget(model, 1000))
    stopped = torch.optim.Adam(model.parameters(), lr=0.0)
    with pytest.raises(ax.GrowthError, match="every learning rate is 0"):
        ax.verdict(model, stopped, **ways(), budget=budget(model, 1000))


def test_a_way_that_diverges_is_no_reason_to_end(old: Old) -> None:
    model, optimizer = old

    def wild() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = build(8)[0]
        return net, torch.optim.SGD(net.parameters(), lr=1e30)

    told = ax.verdict(model, optimizer, anew=wild, evidence=evidence(), budget=budget(model, 1000))
    assert told.winner == "go on" and math.isnan(told.plans[1].expected) and told.gain == 1


@pytest.mark.parametrize("batch", [torch.arange(8.0), (torch.arange(8.0), torch.ones(8, 2)), {"x": torch.arange(8.0)}])
def test_the_parts_of_a_batch_are_all_of_it(batch: Any) -> None:
    assert samples_in(batch) == 8
    parts = [part_of(batch, n, 4) for n in range(4)]
    for whole, cut in zip(_tensors(batch), zip(*map(_tensors, parts), strict=True), strict=True):
        assert torch.equal(torch.cat(cut), whole)
    held = Parts([batch, batch], 4)
    assert len(held) == 8 and all(map(torch.equal, _tensors(held[5]), _tensors(parts[1])))


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [batch] if isinstance(batch, torch.Tensor) else list(batch.values() if isinstance(batch, dict) else batch)


def test_what_cannot_be_cut_stays_whole(old: Old) -> None:
    model, _ = old
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    assert samples_in((x, y[:3])) == 1 and samples_in(([1, 2], y)) == 1
    assert finest(model, ax.Evidence(loss, [(x, y)], [(x, y)])) == 16
    assert finest(nn.Sequential(nn.BatchNorm1d(4), model), ax.Evidence(loss, [(x, y)], [(x, y)])) == 4

    def whole_only(network: nn.Module, batch: Any) -> torch.Tensor:
        return loss(network, (batch[0].view(32, 4), batch[1]))

    assert finest(model, ax.Evidence(whole_only, [(x, y)], [(x, y)])) == 1
    judged = finer(model, ax.Evidence(loss, [(x, y)], [(x, y)])).validation
    assert judged is not None and len(judged) == 32
    assert sorted(float(b[0][0, 0]) for b in judged) == x[:, 0].sort()[0].tolist()
    stays = finer(model, ax.Evidence(whole_only, [(x, y)], [(x, y)])).validation
    assert stays is not None and len(stays) == 1
    odd = ax.Evidence(lambda m, b: loss(m, b) / len(b[0]), [(x, y)], [(x, y)])
    assert len(finer(model, odd).validation or ()) == 1, "the loss of a whole is not the mean of that of its parts"


def curve(loss_at: Callable[[float], float], ends: float, fresh: bool) -> Curve:
    random = torch.Generator().manual_seed(0)
    scale = 1 + 0.1 * torch.randn(16, generator=random)
    return Curve(tuple(Point(s, tuple((loss_at(s) * scale).tolist())) for s in (ends / 4, ends / 2, ends)), fresh)


def test_curves_are_carried_on() -> None:
    flat, falling = curve(lambda s: 0.5, 0.1, False), curve(lambda s: 0.2 + 0.1 * s**-0.5, 0.1, True)
    ends = forecasts([[flat], [falling], []], cut=1)
    assert ends[:, 0].median() == pytest.approx(0.5, rel=0.05) and ends[:, 2].isnan().all()
    assert ends[:, 1].median() == pytest.approx(0.3, rel=0.15), "0.516 at the last look"
    begun = curve(lambda s: 2.3 / (1 + (20 * s) ** 2), 0.05, True)
    end = forecasts([[begun]], cut=1)[:, 0]
    assert end.quantile(0.05) < 0.1 < end.quantile(0.95) < 1.15, "it has hardly begun to fall: anything can come"
    rising = forecasts([[curve(lambda s: 1 + s, 0.1, False)]], cut=1)[:, 0]
    assert rising.median() == pytest.approx(1.1, rel=0.05), "what gets worse is not expected to get worse yet"


def test_steps_on_parts_count_for_more_than_their_samples() -> None:
    falling = curve(lambda s: s**-0.3, 0.05, True)
    whole, parts = (forecasts([[falling]], cut=cut)[:, 0] for cut in (1, 16))
    assert parts.median() > whole.median(), "less of the way is left"


def test_pilots_that_disagree_widen_the_range() -> None:
    one, other = curve(lambda s: 0.5, 0.1, False), curve(lambda s: 0.7, 0.2, False)
    alone, both = (forecasts([held], cut=1)[:, 0].log().std() for held in ([other], [one, other]))
    assert both > 2 * alone


JUDGE = """
import torch
from torch import nn
import auxin as ax


def build(width):
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    return net, torch.optim.Adam(net.parameters(), lr=1e-2)


def judge():
    torch.manual_seed(0)
    x = torch.randn(1024, 4)
    batches = [*zip(x.split(32), x.prod(1, keepdim=True).split(32))]
    evidence = ax.Evidence(lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batches[:16], validation=batches[16:])
    return *build(2), {"edits": ax.Widen("0", by=6), "anew": lambda: build(8), "evidence": evidence, "budget": 1e6}


def without_budget():
    *parts, words = judge()
    del words["budget"]
    return *parts, words


def only_a_network():
    return build(2)


def raises():
    raise ValueError("no data here")
"""


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_judge_of_ours.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "a_judge_of_ours", raising=False)


@pytest.mark.usefixtures("at_home")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["verdict", "a_judge_of_ours:judge", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [plan["name"] for plan in told["plans"]] == ["go on", "grow", "start anew"] and told["budget"] == 1e6
    assert status == (told["winner"] == "no difference")
    assert main(["verdict", "a_judge_of_ours:judge", "--budget", "2e4"]) == 1
    assert "price: " in capsys.readouterr().out


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("a_judge_of_ours:without_budget", "Return 'budget', or pass --budget"),
        ("a_judge_of_ours:only_a_network", "it returns (Sequential, Adam). Return the model"),
        ("a_judge_of_ours:raises", "it does not build: ValueError: no data here"),
        ("a_judge_of_ours", "write it as module:factory"),
    ],
)
def test_the_command_says_what_is_wrong(place: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verdict", place]) == 2
    told = capsys.readouterr().err
    assert told.startswith("auxin verdict: ") and message in told


def past(of: Callable[[float], float], steps: int = 1000) -> list[tuple[float, float]]:
    return [(n, of(n)) for n in range(25, steps + 1, 25)]


def test_the_past_tells_where_a_new_network_goes() -> None:
    """The way that the smaller one went, some octaves ahead of it."""
    told = Past(past(lambda n: 10 / n**0.5))
    steps = (10, 100, 400, 4000)  # the first before the past begins, the last after it ends
    ends = foreseen(told, [("fresh", n) for n in steps]).median(0).values.exp().tolist()
    assert ends == sorted(ends, reverse=True)
    assert all(0.4 * 10 / n**0.5 < end < 10 / n**0.5 for n, end in zip(steps, ends, strict=True))


def test_the_past_tells_whether_going_on_or_growing_has_something_to_gain() -> None:
    """Where the curve still falls, many steps are worth more than room; where it has flattened, or rises, room is."""
    falling, flat = Past(past(lambda n: 1 / n)), Past(past(lambda n: 1 / min(n, 200)))
    for curve, better in ((falling, 0), (flat, 1)):
        ends = foreseen(curve, [("old", 500), ("grown", 50)])
        assert float((ends.argmin(1) == better).double().mean()) > 0.7


def test_a_budget_that_pays_for_no_pilot_is_judged_by_the_past_alone(old: Old) -> None:
    model, optimizer = old
    known = {"budget": budget(model, 60), **ways()}
    assert ax.verdict(model, optimizer, **known).words
    told = ax.verdict(model, optimizer, **known, history=past(lambda n: 1 / n, 200))
    assert told.rounds == 0 and not told.words and told.winner == "go on" and told.price <= 0.1 * told.budget
    assert all(math.isfinite(plan.expected) for plan in told.plans)


def test_the_past_is_weighed_beside_the_pilots(old: Old) -> None:
    model, optimizer = old
    known = {"budget": budget(model, 4000), **ways()}
    without = ax.verdict(model, optimizer, **known).plans
    low, high = (
        ax.verdict(model, optimizer, **known, history=past(lambda n, level=level: level / n**0.3)).plans[2].expected
        for level in (0.1, 10)
    )
    assert low < without[2].expected < high


@pytest.mark.parametrize(
    ("history", "match"),
    [
        ([1.0, 0.5, 0.3, 0.2], r"history=\.\.\.\).*Pass pairs of optimizer steps and the loss"),
        ([(1, "low")], "Pass pairs of optimizer steps"),
        ([], r"0 points tell too little: pass 4 or more"),
        ([(100, 1.0), (150, 0.8), (200, 0.7), (300, 0.6)], "4 points from step 100 to 300 tell too little"),
        ([(0, 1.0), (100, 0.8), (200, 0.7), (400, 0.6)], "its steps have to rise from above 0"),
        ([(100, 1.0), (90, 0.8), (200, 0.7), (400, 0.6)], "its steps have to rise"),
        ([(100, 1.0), (150, math.nan), (200, 0.7), (400, 0.6)], "its losses to be finite"),
    ],
)
def test_a_past_that_tells_nothing(history: Any, match: str, old: Old) -> None:
    model, optimizer = old
    before = state(model, optimizer)
    with pytest.raises(ax.GrowthError, match=match):
        ax.verdict(model, optimizer, budget=budget(model, 1000), **ways(), history=history)
    assert same(before, state(model, optimizer))


def test_the_past_tells_nothing_of_a_new_network_that_is_below_it_already() -> None:
    def curve(losses: tuple[float, float, float], fresh: bool) -> Curve:
        return Curve(tuple(Point(0.01 * 2**n, (loss,) * 4) for n, loss in enumerate(losses)), fresh)

    old, past = curve((1.0, 1.0, 1.0), False), (0.0, torch.full((DRAWS, 2), 3.0, dtype=torch.float64))
    for losses, told in (((2.0, 1.5, 0.9), False), ((2.0, 1.6, 1.1), True)):
        ways = [[old], [curve(losses, True)]]
        assert torch.equal(forecasts(ways, cut=1)[:, 1], forecasts(ways, cut=1, past=past)[:, 1]) is not told

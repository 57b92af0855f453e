"""What one rank refuses no rank does; who disagrees, is missing or has grown alone is named."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from ranked import Net, assert_ranks_equal, share, train_step, values, wrapped
from torch import nn

import auxin as ax

PROBE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
ONE_MORE = ax.Duplicate("blocks", by=1)


def setting(rank: int, **options: Any) -> tuple[Any, Any, Any]:
    """A wrapped network after two steps, its optimizer, and a Grower that grows when it is told."""
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {"edits": ONE_MORE, "when": lambda reading: False, "probe": PROBE, **options}
    grower = ax.Grower(model, optimizer, **given)
    for step in range(2):
        train_step(model, optimizer, *share(step, rank, 2))
    return model, optimizer, grower


def everything(model: Any, optimizer: Any) -> list[Any]:
    """What must be as before: the wrapper's own attributes, all tensors by identity and value, the groups."""
    own = [(name, id(value)) for name, value in vars(model).items()]
    tensors = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()]
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    return [own, tensors, groups, state, torch.get_rng_state()]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def refused(model: Any, optimizer: Any, call: Any) -> str:
    """The text of the refusal; all is as before, and training goes on in step."""
    before = everything(model, optimizer)
    with pytest.raises(ax.GrowthError) as error:
        call()
    assert same(before, everything(model, optimizer))
    rank = dist.get_rank()
    for step in range(2, 4):
        train_step(model, optimizer, *share(step, rank, 2))
        assert_ranks_equal(model)
    return str(error.value)


def other_edit(rank: int) -> str:
    model, optimizer, grower = setting(rank)
    return refused(model, optimizer, lambda: grower.grow(ax.Duplicate("blocks", by=1 + rank)))


def test_another_edit_on_one_rank_is_refused_on_all() -> None:
    first, second = on_ranks(2, other_edit)
    assert first == second
    assert "rank 0: Duplicate" in first and "'by': 1" in first and "rank 1: Duplicate" in first and "'by': 2" in first


def other_seed(rank: int) -> str:
    model, optimizer, _ = setting(rank)
    optimizer.zero_grad()
    return refused(model, optimizer, lambda: ax.grow(model, ONE_MORE, optimizer, probe=PROBE, seed=rank))


@pytest.mark.distributed
def test_another_seed_on_one_rank_is_refused_on_all() -> None:
    assert all("rank 0: seed 0" in text and "rank 1: seed 1" in text for text in on_ranks(2, other_seed))


def only_tried(rank: int) -> str:
    model, optimizer, _ = setting(rank)
    optimizer.zero_grad()
    return refused(model, optimizer, lambda: ax.grow(model, ONE_MORE, optimizer, probe=PROBE, dry_run=rank == 1))


def test_a_dry_run_on_one_rank_is_refused_on_all() -> None:
    for text in on_ranks(2, only_tried):
        assert "the ranks differ. rank 0: dry_run False; rank 1: dry_run True" in text


def no_use_for_it(rank: int, where: str) -> str:
    def raising(change: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError("no space for the list of parameters")

    words: dict[str, Any] = {}
    if where == "probe" and rank == 1:
        words["probe"] = lambda: torch.randn(4, 5)  # a callable is not asked before the growth
    if where == "on_growth":
        words["on_growth"] = raising
    model, optimizer, grower = setting(rank, **words)
    if where == "gradient" and rank == 1:
        model.module.out.bias.grad += 1
    before = everything(model, optimizer)
    try:
        grower.grow(ONE_MORE)
    except (ax.GrowthError, OSError) as error:
        assert same(before, everything(model, optimizer)) and not len(grower.journal)
        return f"{type(error).__name__}: {error}"
    return "grown"


@pytest.mark.parametrize(
    ("where", "first", "second"),
    [
        ("probe", "GrowthError: rank 1: probe: Net does not run", "GrowthError: rank 1: probe: Net does not run"),
        ("on_growth", "GrowthError: rank 1: OSError: no space", "OSError: no space"),
        ("gradient", "BadMoment: rank 1: not now: out.bias has", "BadMoment: rank 1: not now: out.bias has"),
    ],
)
def test_what_one_rank_refuses_no_rank_does(where: str, first: str, second: str) -> None:
    texts = on_ranks(2, no_use_for_it, where)
    assert texts[0].startswith(first) and texts[1].startswith(second)
    assert "all are as they were" in texts[0]


def undone_with_an_error(rank: int) -> str:
    def data_is_gone() -> None:
        if rank == 1:
            raise ValueError("the data is gone")

    model, optimizer, grower = setting(rank, on_undo=data_is_gone)
    grower.grow(ONE_MORE)
    with pytest.raises((ValueError, RuntimeError)) as error:
        grower.undo()
    assert not isinstance(error.value, ax.GrowthError)
    assert len(model.module.blocks) == 1
    for step in range(2, 4):
        train_step(model, optimizer, *share(step, rank, 2))
        assert_ranks_equal(model)
    return str(error.value)


def test_what_on_undo_raises_on_one_rank_is_raised_on_all() -> None:
    first, second = on_ranks(2, undone_with_an_error)
    assert "rank 1: ValueError: the data is gone" in first and second == "the data is gone"


def logged(rank: int, path: str) -> None:
    _, _, grower = setting(rank, log=path)
    grower.on_growth = lambda change: 1 // (1 - rank)
    with pytest.raises((ZeroDivisionError, ax.GrowthError)):
        grower.grow(ONE_MORE)
    grower.on_growth = None
    grower.grow(ONE_MORE)
    grower.step(1.0)


def test_rank_0_alone_writes_the_log_and_only_what_happened(tmp_path: Any) -> None:
    on_ranks(2, logged, str(tmp_path / "run"))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count('"kind": "growth"') == text.count('"kind": "reading"') == 1


def kept_decision(rank: int) -> Any:
    model, optimizer, grower = setting(rank, when=ax.when.every(1))
    if rank == 1:
        model.module.out.bias.grad += 1
    first = grower.step(), grower.waiting_for
    train_step(model, optimizer, *share(2, rank, 2))
    second = grower.step()
    return first, second is not None


@pytest.mark.distributed
def test_a_bad_moment_on_one_rank_keeps_the_decision_on_all() -> None:
    for (change, reason), later in on_ranks(2, kept_decision):
        assert change is None and "rank 1: not now" in reason and later


def one_sided(rank: int, firing: int) -> Any:
    seen: list[float] = []

    def when(reading: Any) -> bool:
        seen.append(reading.metric)
        return dist.get_rank() == firing

    model, optimizer, grower = setting(rank, when=when)
    change = grower.step(float(rank), other=3.0)
    train_step(model, optimizer, *share(2, rank, 2))
    assert_ranks_equal(model)
    return change is not None, seen, grower.progress.metrics


@pytest.mark.parametrize("firing", [pytest.param(0, marks=pytest.mark.distributed), 1])
def test_rank_0_decides_over_the_mean_of_the_readings(firing: int) -> None:
    for grown, seen, metrics in on_ranks(2, one_sided, firing):
        assert grown == (firing == 0) and seen == [0.5] and metrics == {"metric": 0.5, "other": 3.0}


def own_choice(rank: int) -> Any:
    edits = [ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=2), ax.After("blocks.0.up")]
    model, optimizer, grower = setting(
        rank, edits=edits, when=ax.when.every(1), choose=lambda edits, grower: edits[2 - dist.get_rank()]
    )
    change = grower.step()
    train_step(model, optimizer, *share(2, rank, 2))
    assert_ranks_equal(model)
    return type(change.edit).__name__


def test_ranks_that_choose_otherwise_follow_rank_0() -> None:
    assert on_ranks(2, own_choice) == ["After", "After"]


def raises_alone(rank: int, where: str, path: str) -> Any:
    """Rank 1 is done by a clock of its own, or its list of edits raises; or the log of rank 0 does."""

    def edits(model: Any) -> list[Any]:
        if where == "edits" and rank == 1 and calls:
            raise ValueError("no edits here")
        return [ONE_MORE]

    class Always:
        done = where == "done" and rank == 1

        def __call__(self, reading: Any) -> bool:
            return True

    def no_log(*_: Any) -> None:
        raise MemoryError("of the log")

    calls: list[int] = []
    model, optimizer, grower = setting(rank, edits=edits, when=Always(), log=path if where == "log" else None)
    calls.append(1)
    if where == "log" and rank == 0:
        grower.log.growth = no_log
    try:
        grower.step(1.0)
        text = "grown"
    except (ax.GrowthError, ValueError, MemoryError) as error:
        text = str(error)
    assert_ranks_equal(model)
    for step in range(2, 4):
        train_step(model, optimizer, *share(step, rank, 2))
        assert_ranks_equal(model)
    return text, len(grower.journal), len(model.module.blocks)


@pytest.mark.parametrize(
    ("where", "texts", "blocks"),
    [
        ("done", ("grown", "grown"), 2),
        ("edits", ("rank 1: ValueError: no edits here", "no edits here"), 1),
        ("log", ("of the log", "rank 0: MemoryError: of the log"), 1),
    ],
)
def test_what_one_rank_alone_has_its_trigger_edits_and_log_do(
    where: str, texts: tuple[str, str], blocks: int, tmp_path: Any
) -> None:
    said = on_ranks(2, raises_alone, where, str(tmp_path / "run"), patience=5.0)
    for (text, growths, found), expected in zip(said, texts, strict=True):
        assert text.startswith(expected) and growths == blocks - 1 and found == blocks


def other_readings(rank: int) -> str:
    model, optimizer, grower = setting(rank)
    return refused(model, optimizer, lambda: grower.step(1.0) if rank else grower.step(accuracy=1.0))


@pytest.mark.distributed
def test_different_readings_are_named() -> None:
    for text in on_ranks(2, other_readings):
        assert "rank 0: accuracy" in text and "rank 1: metric" in text


def wait_for(word: str) -> None:
    """Until another rank has said it; however long it takes."""
    dist.distributed_c10d._get_default_store().wait([word])


def say(word: str) -> None:
    dist.distributed_c10d._get_default_store().set(word, "")


def be_impatient() -> None:
    """From now on, when all that the other rank does is done: so it does not matter how busy the machine is."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)


def missing(rank: int) -> Any:
    """Rank 1 comes when rank 0 has given up."""
    _, _, grower = setting(rank)
    dist.barrier()
    if rank == 1:
        wait_for("it has given up")
        return None
    be_impatient()
    with pytest.raises(ax.GrowthError) as error:
        grower.step(1.0)
    say("it has given up")
    return str(error.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    assert "rank 1 of 2 did not come within 2 s" in on_ranks(2, missing)[0]


def in_different_calls(rank: int) -> str:
    model, optimizer, grower = setting(rank)
    return refused(model, optimizer, lambda: grower.grow(ONE_MORE) if rank else ax.verify(model, optimizer))


def test_ranks_in_different_calls_are_told_so() -> None:
    for text in on_ranks(2, in_different_calls):
        assert "rank 0: verify; rank 1: grow" in text


def grown_alone(rank: int, trained: bool) -> list[str]:
    model, optimizer, grower = setting(rank)
    if rank == 1:
        block = Net(8, 1).blocks[0]
        model.module.blocks.append(block)
        if trained:
            optimizer.param_groups[0]["params"] += block.parameters()
    texts = []
    if trained and rank == 1:
        with pytest.raises(ax.GrowthError) as error:
            optimizer.step()
        texts.append(str(error.value))
    with pytest.raises(ax.GrowthError) as error:
        grower.step(1.0)
    return [*texts, str(error.value)]


@pytest.mark.parametrize("trained", [pytest.param(False, marks=pytest.mark.distributed), True])
def test_who_has_grown_alone_is_named_before_the_next_step(trained: bool) -> None:
    (first,), (*own, second) = on_ranks(2, grown_alone, trained)
    assert first == second and first.startswith("rank 1: blocks.1.norm.weight") and "without auxin" in first
    assert not trained or "blocks.1.norm.weight" in own[0] and "Nothing was stepped" in own[0]


def taken_out_alone(rank: int) -> str:
    _, _, grower = setting(rank)
    if rank == 1:
        grower.model.blocks = nn.ModuleList()
    with pytest.raises(ax.GrowthError) as error:
        grower.step(1.0)
    return str(error.value)


@pytest.mark.distributed
def test_who_has_shrunk_alone_is_named() -> None:
    for text in on_ranks(2, taken_out_alone):
        assert "the ranks differ" in text and "rank 0: blocks.0.norm.weight (8,)" in text and "rank 1:" in text


def drifted(rank: int) -> str:
    model, optimizer, _ = setting(rank)
    ax.verify(model, optimizer)
    if rank == 1:
        with torch.no_grad():
            model.module.out.bias += 1
    with pytest.raises(ax.GrowthError) as error:
        ax.verify(model, optimizer)
    return str(error.value)


def test_verify_compares_ranks() -> None:
    for text in on_ranks(2, drifted):
        assert "verify: the ranks differ" in text and text.count("out.bias") == 2


def inner_model(rank: int) -> list[str]:
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters())
    texts = []
    for call in (
        lambda: ax.Grower(model.module, optimizer, edits=ONE_MORE, when=ax.when.every(1), probe=PROBE),
        lambda: ax.grow(model.module, ONE_MORE, optimizer, probe=PROBE),
        lambda: ax.surgery(model.module, optimizer),
        lambda: ax.verify(model.module, optimizer),
    ):
        with pytest.raises(ax.GrowthError) as error:
            call()
        texts.append(str(error.value))
    ax.grow(model.module, ONE_MORE, model, optimizer, probe=PROBE)  # the wrapper as a companion will do
    train_step(model, optimizer, *share(0, rank, 2))
    assert_ranks_equal(model)
    free = Net()
    ax.grow(free, ONE_MORE, probe=PROBE)  # one without a wrapper is nobody's business
    return texts


def test_the_network_without_its_wrapper_is_refused() -> None:
    for texts in on_ranks(2, inner_model):
        assert len(texts) == 4 and all("Pass the wrapper in place of the network" in text for text in texts)


def killed_inside(rank: int) -> Any:
    """Rank 1 ends in the middle of a growth; rank 0 comes out, unchanged."""
    model, optimizer, grower = setting(rank)
    if rank == 1:
        import os

        grower.on_growth = lambda change: (say("rank 1 ends"), os._exit(0))
        grower.grow(ONE_MORE)
    grower.on_growth = lambda change: (wait_for("rank 1 ends"), be_impatient())
    before = everything(model, optimizer)
    with pytest.raises(ax.GrowthError) as error:
        grower.grow(ONE_MORE)
    dist.destroy_process_group()
    return same(before, everything(model, optimizer)), values(*model.parameters()).isfinite().all(), str(error.value)


def test_a_rank_that_dies_inside_a_growth_is_named() -> None:
    with pytest.raises(AssertionError, match="rank 1: ended without a word"):
        on_ranks(2, killed_inside)

"""Checkpoints of several processes: one writes, all go on from it, each with its own random numbers."""

import errno
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import shuffled
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "ddp"))
from processes import on_ranks
from ranked import assert_ranks_equal

import auxin as ax
from auxin.checkpoint import directory


class Run:
    """Data and dropout from the random generators of its own rank."""

    def __init__(self):
        rank = dist.get_rank() if dist.is_initialized() else 0
        torch.manual_seed(0)
        net = shuffled.Net()
        self.model = DistributedDataParallel(net) if dist.is_initialized() else net
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        words = {"edits": ax.Duplicate("blocks", by=1), "when": ax.when.every(4), "probe": torch.randn(4, 5)}
        self.grower = ax.Grower(self.model, self.optimizer, **words, rewarm=3)
        torch.manual_seed(100 + rank)
        self.own = torch.Generator().manual_seed(200 + rank)

    def train(self, steps):
        losses = []
        for _ in range(steps):
            x = torch.randn(8, 5) + torch.rand(8, 1, generator=self.own)
            loss = nn.functional.mse_loss(self.model(x), x.sin().sum(1, keepdim=True))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.grower.step()
            losses.append(loss.item())
        return losses

    def save(self, folder):
        ax.save(self.grower, folder, extra={"own": self.own.get_state()})

    def load(self, folder):
        self.own.set_state(ax.load(folder, self.grower)["own"])

    def picture(self):
        state = [*self.model.state_dict().items(), *sorted(self.optimizer.state_dict()["state"].items())]
        return repr((state, len(self.grower.journal), self.grower.calls, torch.get_rng_state().tolist()))


def saved_and_loaded(rank, folder):
    run = Run()
    run.train(10)
    run.save(folder)
    expected = run.train(20)
    fresh = Run()
    fresh.load(folder)
    found = fresh.train(20)
    assert_ranks_equal(fresh.model)
    return found == expected, len(fresh.grower.journal), expected


def test_each_rank_goes_on_to_the_bit(tmp_path):
    results = on_ranks(2, saved_and_loaded, tmp_path)
    assert [(same, growths) for same, growths, _ in results] == [(True, 7), (True, 7)]
    assert results[0][2] != results[1][2] and os.listdir(tmp_path) == ["checkpoint-000001"]


def test_what_two_ranks_saved_goes_on_in_one_process_and_the_other_way_round(tmp_path):
    on_ranks(2, saved_and_loaded, tmp_path / "two")
    run = Run()
    run.load(tmp_path / "two")
    assert len(run.model.blocks) == 3 and run.own.initial_seed() == 200
    run.train(3)
    run.save(tmp_path / "one")
    assert all(on_ranks(2, loaded_from_one, tmp_path / "one"))
    ax.load(tmp_path / "two", net := shuffled.Net())
    assert len(net.blocks) == 3


def loaded_from_one(rank, folder):
    run = Run()
    before = torch.get_rng_state()
    run.load(folder)
    kept = torch.equal(before, torch.get_rng_state())  # there was no rank 1
    run.train(5)
    assert_ranks_equal(run.model)
    return len(run.grower.journal) == 4 and kept == (rank == 1)


def bare_under_a_wrapper(rank, folder):
    """A bare network under DDP: what grows is synchronised."""
    run = Run()
    run.train(4)
    run.save(folder)
    torch.manual_seed(0)
    wrapper = DistributedDataParallel(shuffled.Net())
    ax.load(folder, wrapper)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        wrapper(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_ranks_equal(wrapper)
    return len(wrapper.module.blocks)


def test_a_wrapped_network_for_inference(tmp_path):
    assert on_ranks(2, bare_under_a_wrapper, tmp_path) == [2, 2]


# ---- what one rank cannot do, none does


def refused(act):
    try:
        act()
    except ax.GrowthError as error:
        return str(error)
    return "nothing was refused"


def disk_full_on_rank_0(rank, folder):
    run = Run()
    run.train(5)
    run.save(folder)
    before, write = run.picture(), directory.os.fsync

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory.os.fsync = full
    text = refused(lambda: run.save(folder))
    directory.os.fsync = write
    assert run.picture() == before
    run.train(3)
    assert_ranks_equal(run.model)
    run.save(folder)
    return text


def test_a_full_disk_is_heard_of_on_all_ranks(tmp_path):
    for text in on_ranks(2, disk_full_on_rank_0, tmp_path):
        assert re.search("rank 0: Cannot save to .*No space left.*all are as they were", text)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-000001", "checkpoint-000002"]


def disks_of_their_own(rank, folder, how):
    run = Run()
    run.train(5)
    run.save(folder / "shared")
    run.train(3)
    run.save(folder / "shared")
    own = folder / str(rank)
    shutil.copytree(folder / "shared", own)
    newest = own / "checkpoint-000002"
    if rank == 1:
        shutil.rmtree(newest) if how == "missing" else (newest / "model.safetensors").write_bytes(b"cut")
        if how == "all gone":
            shutil.rmtree(own)
    before = run.picture()
    text = refused(lambda: run.load(own))
    assert run.picture() == before
    run.train(3)
    assert_ranks_equal(run.model)
    return text


@pytest.mark.parametrize("how", ["missing", "damaged", "all gone"])
@pytest.mark.filterwarnings("ignore:The checkpoint")
def test_ranks_that_would_load_different_checkpoints_load_none(tmp_path, how):
    said = "rank 1: There is nothing at" if how == "all gone" else "the ranks differ. rank 0: checkpoint-000002"
    for text in on_ranks(2, disks_of_their_own, tmp_path, how):
        assert said in text, text


def broken_on_rank_1(rank, folder):
    """What only one rank's companion refuses, after the others have loaded."""
    run = Run()
    run.train(5)
    run.save(folder)
    fresh = Run()
    if rank == 1:
        fresh.grower.when.__dict__["load_state_dict"] = broken
    before = fresh.picture()
    text = refused(lambda: fresh.load(folder))
    assert fresh.picture() == before
    fresh.train(5)
    assert_ranks_equal(fresh.model)
    return text


def broken(_):
    raise ValueError("broken here")


def test_what_one_rank_cannot_load_none_does(tmp_path):
    for text in on_ranks(2, broken_on_rank_1, tmp_path):
        assert "broken here" in text, text


def with_old_words(rank, folder):
    """The store of a process group still holds what was said before all were killed."""
    store = dist.group.WORLD.get_group_store()
    for number in range(1, 30):
        for other in range(2):
            store.set(f"auxin/meeting/{number}/{other}", '["ax.save", "old", null]')
    store.set("auxin/hello/1", "0badbeef 0badbeef")
    for other in range(2):
        store.add(f"auxin/{other}", 3 * other)
    dist.barrier()
    time.sleep(0.2 * rank)  # who comes first hears the old word of the other
    return saved_and_loaded(rank, folder)[:2]


def test_what_was_said_before_a_restart_is_not_heard(tmp_path):
    assert on_ranks(2, with_old_words, tmp_path) == [(True, 7), (True, 7)]


def one_saves_alone(rank, folder):
    run = Run()
    run.train(3)
    return refused(lambda: run.save(folder) if rank == 0 else run.load(folder))


def test_a_rank_that_does_something_else_is_named(tmp_path):
    for text in on_ranks(2, one_saves_alone, tmp_path):
        assert "the ranks are in different calls: rank 0: ax.save; rank 1: ax.load: reading" in text

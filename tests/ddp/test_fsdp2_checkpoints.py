"""Checkpoints of sharded runs: the same run goes on, on as many ranks as there are, from a whole checkpoint or none."""

import contextlib
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import RankFailed, on_ranks
from ranked import Net, share, train_step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from under_fsdp import PROBE, plain, set_up, shard, shards

import auxin as ax
from auxin.checkpoint import directory, run

FIRST, SECOND = ax.Duplicate("blocks", by=1), ax.Duplicate("blocks", by=1, order="last", output="keep", state="copy")


class Job:
    """A network of one seed with AdamW, a schedule and an average; sharded where there are several ranks."""

    def __init__(self, rank: int, size: int, build: Any = plain):
        self.rank, self.size = rank, size
        self.model, copy = build(1), build(1)
        self.average = AveragedModel(copy, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        if size > 1:
            shard(self.model)
            shard(self.average.module)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        words: dict[str, Any] = {"edits": [FIRST, SECOND], "when": ax.when.at([3, 5]), "probe": PROBE}
        self.grower = ax.Grower(self.model, self.optimizer, schedule, self.average, **words)
        self.schedule = schedule
        torch.manual_seed(rank)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            losses.append(train_step(self.model, self.optimizer, *share(step, self.rank, self.size)))
            self.schedule.step()
            self.average.update_parameters(self.model)
            self.grower.step(losses[-1])
        return losses

    def state(self) -> dict[str, torch.Tensor]:
        """Every shard, or every tensor, of network, optimizer and average; and the random generator."""
        if self.size > 1:
            weights = {**shards(self.model), **{f"average {n}": t for n, t in shards(self.average.module).items()}}
        else:
            weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                weights[f"{name} {key}"] = getattr(value, "to_local", lambda value=value: value)().clone()
        return {**weights, "random": torch.get_rng_state()}


def saved(rank: int, size: int, path: str) -> Any:
    """Two growths in eight steps, saved before the last; what comes then."""
    job = Job(rank, size)
    job.train(range(6))
    ax.save(job.grower, path, extra={"step": 6})
    job.train(range(6, 8))
    ax.save(job.grower, path, extra={"step": 8, "rank": rank}, keep_last=1)
    state = job.state()
    return state, job.train(range(8, 18)), job.state()


def resumed(rank: int, size: int, path: str) -> Any:
    job = Job(rank, size)
    extra = ax.load(path, job.grower)
    assert len(job.model.blocks) == 3 and len(job.grower.journal) == 2 and extra["step"] == 8
    state = job.state()
    if size > 1:
        set_up(job.model)
        set_up(job.average.module)
    ax.verify(job.model, job.optimizer, job.schedule, job.average)
    return state, job.train(range(8, 18)), job.state(), extra


def means(results: list[Any]) -> list[float]:
    return [sum(losses) / len(losses) for losses in zip(*(result[1] for result in results), strict=True)]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def close(ours: list[float], theirs: list[float]) -> None:
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-6


def test_two_ranks_save_and_two_or_one_go_on(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    before = on_ranks(2, saved, 2, path)
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["checkpoint-000002"]
    after = on_ranks(2, resumed, 2, path)
    for rank, (ours, theirs) in enumerate(zip(before, after, strict=True)):
        assert equal(ours[0], theirs[0]) and ours[1] == theirs[1] and equal(ours[2], theirs[2])
        assert theirs[3] == {"step": 8, "rank": rank}
    close(means(before), resumed(0, 1, path)[1])
    bare = plain(1)
    ax.load(path, bare)  # for inference
    one = Job(0, 1)
    ax.load(path, one.grower)
    assert equal(dict(bare.named_parameters()), dict(one.model.named_parameters()))


@pytest.mark.distributed
def test_two_ranks_save_and_four_go_on_and_one_saves_for_two(tmp_path: Path) -> None:
    path, other = str(tmp_path / "run"), str(tmp_path / "one")
    before = on_ranks(2, saved, 2, path, timeout=120)
    close(means(before), means(on_ranks(4, resumed, 4, path, timeout=120)))
    expected = saved(0, 1, other)
    close(expected[1], means(on_ranks(2, resumed, 2, other, timeout=120)))
    close(expected[1], means(before))


def damaged(path: Path, kind: str) -> None:
    shutil.copytree(path / "good", path / kind)
    newest = path / kind / "checkpoint-000001"
    shard_of_one = newest / "__1_0.distcp"
    if kind == "cut":
        os.truncate(shard_of_one, 100)
    elif kind == "missing":
        shard_of_one.unlink()
    elif kind == "turned":
        content = bytearray(shard_of_one.read_bytes())
        content[len(content) // 2] ^= 1
        shard_of_one.write_bytes(content)
    elif kind == "unlisted":  # a manifest that is right, over shards that torch itself cannot read
        shard_of_one.write_bytes(b"x" * 10_000)
        listed = directory.manifest.parse((newest / "manifest.json").read_bytes())
        sums = directory.manifest.Checksum()
        sums.update(b"x" * 10_000)
        listed["__1_0.distcp"] = directory.manifest.Entry(sums.size, sums.digest, None)
        (newest / "manifest.json").write_bytes(directory.manifest.dump(listed))


KINDS = {
    "cut": "__1_0.distcp has 100 bytes",
    "missing": "__1_0.distcp is missing",
    "turned": "__1_0.distcp is not what was written",
    "unlisted": "the shards in",
    "wide": "another structure here than it gave then",
    "deep": "does not fit this model",
    "lonely": "the ranks differ",
    "journal": "does not fit this model",
}


def wide(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return Net(dim=12, depth=depth)


def deep(depth: int) -> nn.Module:
    return plain(depth + 2)


def refusals(rank: int, path: Path) -> dict[str, str]:
    job = Job(rank, 2)
    ax.save(job.grower, path / "other")
    job.train(range(4))
    ax.save(job.grower, path / "good")
    texts = {}
    for kind in KINDS:
        if rank == 0:
            damaged(path, kind)
            if kind == "journal":
                files = directory.read(path / "good")
                journal = files.bytes("journal.json").replace(b'"blocks"', b'"blokcs"')
                held = {**files.contents, "journal.json": journal}
                listed = [n for n in files.manifest if not n.endswith(directory.SHARDS)]
                plain_files: Any = {n: held[n] if n in held else files.tensors(n) for n in listed}
                with_shards = {n: e for n, e in files.manifest.items() if n.endswith(directory.SHARDS)}

                def copied(to: Path, names: Any = with_shards, source: Path = files.path) -> Any:
                    for name in names:
                        shutil.copy(source / name, to / name)
                    return names

                shutil.rmtree(path / kind)
                directory.write(path / kind, plain_files, more=copied)
        dist.barrier()
        fresh = Job(rank, 2, {"wide": wide, "deep": deep}.get(kind, plain))
        fresh.train(range(2))
        before = fresh.state()
        where = path / ("other" if kind == "lonely" and rank else kind)
        try:
            ax.load(where, fresh.grower)
            texts[kind] = "loaded"
        except ax.GrowthError as error:
            texts[kind] = str(error)
        assert texts[kind] != "loaded" and equal(before, fresh.state()), (kind, texts)
        set_up(fresh.model)
        fresh.train(range(2, 4))
    return texts


@pytest.mark.distributed
def test_what_does_not_fit_is_refused_on_every_rank_with_nothing_changed(tmp_path: Path) -> None:
    first, second = on_ranks(2, refusals, tmp_path, timeout=150)
    assert first == second, first
    for kind, text in KINDS.items():
        assert text in first[kind], (kind, first[kind])


def goes_back(rank: int, path: Path) -> Any:
    with pytest.warns(UserWarning, match="Loaded the newest that is whole"):
        return resumed(rank, 2, str(path))[:2]


@pytest.mark.distributed
def test_the_older_one_goes_on_where_the_newest_was_cut_off(tmp_path: Path) -> None:
    before = on_ranks(2, saved, 2, str(tmp_path))
    shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / "checkpoint-000003")
    (tmp_path / "checkpoint-000003" / "__0_0.distcp").unlink()
    for ours, theirs in zip(before, on_ranks(2, goes_back, tmp_path), strict=True):
        assert equal(ours[0], theirs[0]) and ours[1] == theirs[1]


def killed(rank: int, path: str, where: str, victim: int) -> Any:
    """Save again, and let one rank end, as by a kill, at some place of it."""
    from torch.distributed import checkpoint as dcp

    job = Job(rank, 2)
    ax.load(path, job.grower)
    job.train(range(8, 10))
    if rank == victim:
        owner, name = {
            "shards": (dcp, "save"),
            "written": (dcp.FileSystemWriter, "finish"),
            "files": (directory, "_fill"),
            "named": (directory, "_publish"),
        }[where]
        setattr(owner, name, lambda *args, **words: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ax.GrowthError) as error:
        ax.save(job.grower, path)
    return str(error.value)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "victim"), [("shards", 1), ("shards", 0), ("written", 0), ("files", 0), ("named", 0)]
)
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path, where: str, victim: int) -> None:
    before = on_ranks(2, saved, 2, str(tmp_path))
    with pytest.raises(RankFailed, match="ended without a word"):
        on_ranks(2, killed, str(tmp_path), where, victim, patience=10)
    assert [one.name for one in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]
    after = on_ranks(2, resumed, 2, str(tmp_path))
    assert all(equal(ours[0], theirs[0]) and ours[1] == theirs[1] for ours, theirs in zip(before, after, strict=True))
    on_ranks(2, saved, 2, str(tmp_path))  # the next save removes the rest
    assert len([*tmp_path.iterdir()]) == 1


def full_disk(rank: int, path: str) -> tuple[str, list[str]]:
    from torch.distributed import checkpoint as dcp

    job = Job(rank, 2)
    ax.save(job.grower, path)
    if rank == 1:

        def failing(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        dcp.FileSystemWriter.write_data = failing
    with pytest.raises(ax.GrowthError) as error:
        ax.save(job.grower, path)
    job.train(range(2))
    return str(error.value), os.listdir(path)


@pytest.mark.distributed
def test_a_full_disk_on_one_rank_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = on_ranks(2, full_disk, str(tmp_path))
    assert first == second and first[1] == ["checkpoint-000001"]
    assert "rank 1: OSError: [Errno 28] No space left on device. Nothing was left behind" in first[0]


def own_disks(rank: int, path: str) -> str:
    job = Job(rank, 2)
    with pytest.raises(ax.GrowthError) as error:
        ax.save(job.grower, f"{path}/{rank}")
    return str(error.value)


@pytest.mark.distributed
def test_ranks_without_a_common_disk_are_told(tmp_path: Path) -> None:
    for text in on_ranks(2, own_disks, str(tmp_path)):
        assert "rank 1 does not see" in text and "one directory on a disk that all ranks share" in text
    assert [*tmp_path.rglob("*")] == []


def two_networks(rank: int, path: str) -> str:
    job = Job(rank, 2)
    ax.save(job.grower, path)
    other = shard(deep(1) if rank else plain(1))
    with pytest.raises(ax.GrowthError) as error:
        ax.load(path, other)
    return str(error.value)


@pytest.mark.distributed
def test_ranks_with_different_networks_are_told(tmp_path: Path) -> None:
    first, second = on_ranks(2, two_networks, str(tmp_path))
    assert first == second and "ax.load: reading: the ranks differ" in first and "blocks.1" in first


def verified(rank: int, path: Path) -> Any:
    """Which shards this rank reads for their checksums, from one disk and from copies; and what a damaged copy says."""
    read, verify = [], directory._verify

    def noted(checkpoint: Path, name: str, *words: Any) -> None:
        read.extend([name] if name.endswith(directory.SHARDS) else [])
        verify(checkpoint, name, *words)

    directory._verify = noted
    job = Job(rank, 2)
    ax.save(job.grower, path / "good")
    ax.load(path / "good", job.grower)
    shared = [*read]
    shutil.copytree(path / "good", path / str(rank))
    read.clear()
    ax.load(path / str(rank), job.grower)
    if rank == 1:
        shard_of_zero = path / "1" / "checkpoint-000001" / "__0_0.distcp"
        content = bytearray(shard_of_zero.read_bytes())
        content[len(content) // 2] ^= 1
        shard_of_zero.write_bytes(content)
    with pytest.raises(ax.GrowthError) as error:
        ax.load(path / str(rank), job.grower)
    return shared, sorted(read[:2]), str(error.value)


@pytest.mark.distributed
def test_ranks_share_the_checksums_of_one_disk_and_not_those_of_copies(tmp_path: Path) -> None:
    for rank, (shared, own, text) in enumerate(on_ranks(2, verified, tmp_path)):
        assert shared == [f"__{rank}_0.distcp"] and own == ["__0_0.distcp", "__1_0.distcp"]
        assert "rank 1: The checkpoint" in text and "__0_0.distcp is not what was written" in text


def written_later(rank: int, path: str) -> None:
    """A snapshot of torch's own is written when the network has grown and trained on; it is that of when it began."""
    import threading

    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    job, go, write = Job(rank, 2), threading.Event(), dcp.FileSystemWriter.write_data

    def waiting(*args: Any) -> Any:
        go.wait()
        return write(*args)

    dcp.FileSystemWriter.write_data = waiting
    job.train(range(2))
    asked = {"model": job.model.state_dict(), "optim": get_optimizer_state_dict(job.model, job.optimizer)}
    before = shards(job.model)
    moments = {name: state["exp_avg"].to_local().clone() for name, state in asked["optim"]["state"].items()}
    future = dcp.async_save(asked, checkpoint_id=path, process_group=dist.new_group(backend="gloo"))
    for edit in (FIRST, ax.Widen("blocks.0.up", by=3), ax.Replace("blocks.1.norm", nn.Identity)):
        job.grower.grow(edit)
        job.train(range(2, 3))
    set_up(job.model)
    assert not os.path.exists(f"{path}/.metadata")  # which comes last: a checkpoint without it is none
    go.set()
    future.result()
    fresh = Job(rank, 2)
    fresh.train(range(1))
    found = {"model": fresh.model.state_dict(), "optim": get_optimizer_state_dict(fresh.model, fresh.optimizer)}
    dcp.load(found, checkpoint_id=path)
    assert equal(before, shards(fresh.model))
    assert equal(moments, {n: v["exp_avg"].to_local() for n, v in found["optim"]["state"].items()})


@pytest.mark.distributed
def test_a_growth_before_a_snapshot_of_torchs_own_is_written_does_not_reach_it(tmp_path: Path) -> None:
    on_ranks(2, written_later, str(tmp_path / "later"))


def written_in_background(rank: int, path: str) -> None:
    """Ranks that meet in a growth, while the thread of one waits for that of the other, write the moment before it."""
    import threading

    job, go, write = Job(rank, 2), threading.Event(), run._write

    def waiting(*args: Any) -> Any:
        if rank == 0:
            go.wait()
        return write(*args)

    run._write = waiting
    job.train(range(4))
    before = job.state()
    written = ax.async_save(job.grower, path, extra=rank)
    losses = job.train(range(4, 8))
    assert len(job.model.blocks) == 3 and not written.done()
    go.set()
    found = written.result()
    assert (found is None) == (rank == 1)
    run._write = write
    fresh = Job(rank, 2)
    assert ax.load(path, fresh.grower) == rank
    assert equal(before, fresh.state()) and losses == fresh.train(range(4, 8)) and equal(job.state(), fresh.state())
    for folder in (f"{path}/{'a file' if rank == 0 else 'x'}", path):  # what rank 0 cannot write is told on both
        open(f"{path}/a file", "a").close()
        with pytest.warns() if folder != path else contextlib.nullcontext():
            written = ax.async_save(job.grower, folder)
            with pytest.raises(ax.GrowthError, match="Cannot save to") if folder != path else contextlib.nullcontext():
                written.result()


@pytest.mark.distributed
def test_a_growth_before_a_checkpoint_is_written_in_the_background_does_not_reach_it(tmp_path: Path) -> None:
    on_ranks(2, written_in_background, str(tmp_path / "later"))


def refused_on_one(rank: int, path: str) -> list[str]:
    """What one rank alone cannot save is told on both at once, and the next checkpoint is written."""
    job, told, gathered = Job(rank, 2), [], run._gathered

    def failing(*args: Any) -> Any:
        if rank == 1:
            raise ZeroDivisionError("not gathered")
        return gathered(*args)

    for save in (ax.save, ax.async_save):
        with pytest.raises(ax.GrowthError) as error:
            save(job.grower, path, keep_last=1 - rank)
        told.append(str(error.value))
        run._gathered = failing
        with pytest.raises((ax.GrowthError, ZeroDivisionError)) as raised:
            save(job.grower, path)
        told.append(str(raised.value))
        run._gathered = gathered
    ax.async_save(job.grower, path).result()
    return told


@pytest.mark.distributed
def test_what_one_rank_cannot_save_is_told_on_both(tmp_path: Path) -> None:
    for told in on_ranks(2, refused_on_one, str(tmp_path / "run"), patience=20):
        assert ["keep_last=0" in text for text in told] == [True, False] * 2
        assert ["not gathered" in text for text in told] == [False, True] * 2
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["checkpoint-000001"]

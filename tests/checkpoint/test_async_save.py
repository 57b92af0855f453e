"""A checkpoint that is written while the run goes on holds the moment at which it was asked for."""

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import auxin as ax
from auxin.checkpoint import background, run
from auxin.checkpoint.tensors import copies


class Job:
    def __init__(self) -> None:
        torch.manual_seed(3)
        blocks = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)])
        self.net = nn.Sequential(nn.Linear(2, 4), blocks, nn.Linear(4, 1))
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.average = AveragedModel(self.net)
        self.x = torch.randn(8, 2)
        edits = {"edits": [ax.Duplicate("1", by=1, output="keep")], "when": ax.when.at([10**6])}
        self.grower = ax.Grower(self.net, self.opt, self.average, probe=self.x, **edits)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.opt.zero_grad()
            self.net(self.x).square().mean().backward()
            self.opt.step()
            self.average.update_parameters(self.net)
            self.grower.step()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written in the background until this is set; while somebody waits for it, it is."""
    go, write, wait = threading.Event(), run.write, background.wait

    def later(*args: Any) -> Path:
        if threading.current_thread() is not threading.main_thread():
            go.wait(60)
        return write(*args)

    def waiting() -> None:
        go.set()
        wait()
        go.clear()

    monkeypatch.setattr(run, "write", later)
    monkeypatch.setattr(background, "wait", waiting)
    yield go
    go.set()


def files(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.iterdir()}


def test_it_writes_what_save_would_have_written(tmp_path: Path, held: threading.Event) -> None:
    job = Job()
    job.train(3)
    ax.save(job.grower, tmp_path / "at once", extra={"epoch": 2})
    written = ax.async_save(job.grower, tmp_path / "later", extra={"epoch": 2})
    job.train(2)
    job.grower.grow(ax.Duplicate("1", by=1, output="keep"))
    job.grower.grow(ax.Widen("1.0.0", by=2))
    job.train(2)
    assert not written.done() and not list(tmp_path.glob("later/checkpoint-*"))
    held.set()
    found = written.result()
    assert found == tmp_path / "later/checkpoint-000001"
    assert files(found) == files(tmp_path / "at once/checkpoint-000001")


def test_what_shares_memory_is_copied_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(300, 32), nn.Linear(32, 300, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(x))

    net = Tied()
    grower = ax.Grower(net, torch.optim.SGD(net.parameters(), lr=0.1), edits=lambda model: [], when=ax.when.every(9))
    found = ax.async_save(grower, tmp_path).result()
    assert found is not None and (found / "model.safetensors").stat().st_size < 1.1 * 300 * 32 * 4


def test_memory_order_is_that_of_save(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.register_buffer("gaps", torch.arange(24.0).reshape(4, 6).t()[::2])
    net.register_buffer("turned", torch.arange(6.0).reshape(3, 2).t())
    grower = ax.Grower(net, edits=lambda model: [], when=ax.when.every(9))
    ax.save(grower, tmp_path / "at once")
    found = ax.async_save(grower, tmp_path / "later").result()
    assert found is not None and files(found) == files(tmp_path / "at once/checkpoint-000001")


def test_save_and_load_and_the_next_one_wait(tmp_path: Path, held: threading.Event) -> None:
    job = Job()
    job.train(1)
    first = ax.async_save(job.grower, tmp_path, keep_last=9)
    job.train(1)
    ax.save(job.grower, tmp_path, keep_last=9)  # the later moment has the higher number
    assert first.done() and first.result() == tmp_path / "checkpoint-000001"
    job.train(1)
    ax.async_save(job.grower, tmp_path, extra=3, keep_last=9)
    assert ax.load(tmp_path, Job().grower) == 3
    second = ax.async_save(job.grower, tmp_path, keep_last=9)
    third = ax.async_save(job.grower, tmp_path, keep_last=9)
    held.set()
    assert second.done() and third.result() == tmp_path / "checkpoint-000005"


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    job = Job()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        written = ax.async_save(job.grower, tmp_path / "a file")
        with pytest.raises(ax.GrowthError, match="Cannot save to .*a file"):
            written.result()
    assert [str(one.message).partition(". ")[0] for one in heard] == ["ax.async_save has written nothing"]
    ax.save(job.grower, tmp_path / "a directory")


def test_what_is_refused_is_refused_at_once(tmp_path: Path) -> None:
    job = Job()
    with pytest.raises(ax.GrowthError, match="keep_last=0"):
        ax.async_save(job.grower, tmp_path, keep_last=0)
    with pytest.raises(ax.GrowthError, match="pass the Grower first"):
        ax.async_save(job.net, tmp_path)  # type: ignore[arg-type]
    with (
        job.grower.trial(ax.Duplicate("1", by=1, output="keep")),
        pytest.raises(ax.GrowthError, match="inside a trial"),
    ):
        ax.async_save(job.grower, tmp_path)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    grower = ax.Grower(empty, edits=lambda model: [], when=ax.when.every(9))
    with pytest.raises(ax.GrowthError, match="on the meta device"):
        ax.async_save(grower, tmp_path)
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys, torch, auxin as ax
net = torch.nn.Sequential(torch.nn.Linear(1000, 3000))
grower = ax.Grower(net, torch.optim.SGD(net.parameters(), lr=0.1), edits=lambda model: [], when=ax.when.every(9))
ax.async_save(grower, sys.argv[1])
"""


@pytest.mark.long
def test_a_process_does_not_end_before(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, timeout=300)
    net = nn.Sequential(nn.Linear(1000, 3000))
    ax.load(tmp_path / "checkpoint-000001", net)


def test_the_directory_is_that_of_the_call(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    written = ax.async_save(Job().grower, "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    held.set()
    assert written.result() == tmp_path / "run/checkpoint-000001"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to all that is copied."""
    found: list[Any] = []

    def copied(tensors: Any) -> Any:
        made = copies(tensors)
        found.extend(map(weakref.ref, made.values()))
        return made

    monkeypatch.setattr(run, "copies", copied)
    return found


def test_the_copy_is_let_go_of(tmp_path: Path, kept: list[Any]) -> None:
    (tmp_path / "a file").write_text("")
    job = Job()
    assert ax.async_save(job.grower, tmp_path / "run").result() is not None
    with warnings.catch_warnings(record=True):
        failed = ax.async_save(job.grower, tmp_path / "a file")
        with pytest.raises(ax.GrowthError) as told:
            failed.result()
    gc.collect()
    assert kept and not any(one() is not None for one in kept)
    assert told.value.__cause__ is not None


def test_every_failure_is_told(tmp_path: Path) -> None:
    """Also one of which the very same words were said before, as where a disk stays full."""
    (tmp_path / "a file").write_text("")
    job = Job()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        for _ in range(3):
            with pytest.raises(ax.GrowthError, match="Cannot save to .*a file"):
                ax.async_save(job.grower, tmp_path / "a file").result()
    assert [str(one.message).partition(". ")[0] for one in heard] == 3 * ["ax.async_save has written nothing"]


def test_where_warnings_are_errors_the_future_says_what_has_happened(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ax.GrowthError, match="Cannot save to .*a file"):
            ax.async_save(Job().grower, tmp_path / "a file").result()


def test_where_no_thread_can_be_started_it_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[Any]
) -> None:
    def none_left(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    (tmp_path / "a file").write_text("")
    job = Job()
    monkeypatch.setattr(threading.Thread, "start", none_left)
    written = ax.async_save(job.grower, tmp_path)
    assert written.done() and written.result() == tmp_path / "checkpoint-000001"
    with warnings.catch_warnings(record=True):
        failed = ax.async_save(job.grower, tmp_path / "a file")
    with pytest.raises(ax.GrowthError, match="Cannot save to .*a file"):
        failed.result()
    gc.collect()
    assert kept and not any(one() is not None for one in kept)

"""Checkpoints that cannot be written, or must not be read: words that help, nothing changed, no file half written."""

import errno
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from growing import Block, Net, assert_same, batch, ema_of, picture, train

import auxin as ax
from auxin.checkpoint import directory

torch.set_num_threads(1)
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class Run:
    """A network with a growth behind it."""

    def __init__(self, dim=8, depth=2, grown=True, optimizer=torch.optim.AdamW, average=True):
        torch.manual_seed(0)
        self.model = Net(dim=dim, depth=depth)
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        companions = [self.optimizer, torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)]
        self.companions = [*companions, ema_of(self.model)] if average else companions
        self.grower = ax.Grower(
            self.model,
            *self.companions,
            edits=[ax.Duplicate("blocks", by=1), ax.Insert("blocks", functools.partial(Block, dim))],
            when=ax.when.every(1),
            probe=batch()[0],
        )
        train(self.model, self.optimizer, 2)
        if grown:
            self.grower.step(1.0)

    def picture(self):
        return picture(self.model, *self.companions) | {"grower": repr(self.grower.state_dict())}


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def save_refused(run, path, match):
    before, pictured = files(path) if path.is_dir() else None, run.picture()
    with pytest.raises(ax.GrowthError, match=match) as error:
        ax.save(run.grower, path, extra={"epoch": 2})
    assert_same(pictured, run.picture())
    assert (files(path) if path.is_dir() else None) == before
    return str(error.value)


def load_refused(run, path, match):
    before, pictured = files(path), run.picture()
    with pytest.raises(ax.GrowthError, match=match) as error:
        ax.load(path, run.grower)
    assert_same(pictured, run.picture())
    bare, start = run.model, picture(run.model)
    assert files(path) == before and bare is run.model
    assert_same(start, picture(run.model))
    return str(error.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_that_is_full(tmp_path, monkeypatch, code, earlier):
    run, path = Run(), tmp_path / "run"
    if earlier:
        ax.save(run.grower, path, extra={"epoch": 1})
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= 3:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(directory.os, "fsync", full)
        save_refused(run, path, f"{os.strerror(code)}")
    assert len(calls) >= 3 and path.exists() is earlier
    if earlier:
        assert ax.load(path, Run(grown=False).grower) == {"epoch": 1}
    ax.save(run.grower, path, extra={"epoch": 2})
    assert ax.load(path, Run(grown=False).grower) == {"epoch": 2}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = ROOT and sys.platform == "linux" and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_without_room(small_disk):
    run = Run(dim=32)
    text = save_refused(run, small_disk, "No space left|not enough room|full")
    assert str(small_disk) in text


@pytest.mark.parametrize("place", ["run", "deeper/run"])
def test_a_directory_that_is_read_only(tmp_path, monkeypatch, place):
    locked = tmp_path / "locked"
    locked.mkdir()
    if ROOT:  # root may write anyway
        make = os.mkdir

        def refuse(path, *args, **kwargs):
            if str(path).startswith(str(locked)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return make(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", refuse)
    locked.chmod(0o500)
    save_refused(Run(), locked / place, r"locked/.*(Permission denied|not be written)")
    locked.chmod(0o700)
    assert list(locked.iterdir()) == []


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ax.GrowthError, match="run"):
        ax.save(Run().grower, tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("extra", [{"loader": object()}, [lambda: 0], {1, 2, 3}.__iter__()])
def test_something_extra_that_has_no_plain_form(tmp_path, extra):
    run = Run()
    ax.save(run.grower, tmp_path, extra={"epoch": 1})
    before = files(tmp_path)
    with pytest.raises(ax.GrowthError, match="extra"):
        ax.save(run.grower, tmp_path, extra=extra)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "journal.json", "manifest.json"])
@pytest.mark.parametrize("how", ["cut off", "empty", "gone", "one bit"])
def test_a_checkpoint_that_was_cut_off(tmp_path, name, how):
    ax.save(Run().grower, tmp_path / "run", extra={"epoch": 1})
    checkpoint = tmp_path / "run" / "checkpoint-000001"
    found = [p for p in checkpoint.iterdir() if p.name == name] or [checkpoint / directory.manifest.NAME]
    data = bytearray(found[0].read_bytes())
    if how == "gone":
        found[0].unlink()
    elif how == "one bit":
        data[len(data) // 2] ^= 1
        found[0].write_bytes(data)
    else:
        found[0].write_bytes(data[: 0 if how == "empty" else len(data) // 2])
    text = load_refused(Run(grown=False), tmp_path / "run", "checkpoint")
    assert "checkpoint-000001" in text or "run" in text


def test_an_older_checkpoint_is_named_and_can_be_loaded(tmp_path):
    run = Run()
    ax.save(run.grower, tmp_path, extra={"epoch": 1})
    ax.save(run.grower, tmp_path, extra={"epoch": 2})
    target = tmp_path / "checkpoint-000002" / "model.safetensors"
    target.write_bytes(target.read_bytes()[:100])
    text = load_refused(Run(grown=False), tmp_path / "checkpoint-000002", "model.safetensors")
    assert "checkpoint-000001" in text
    with pytest.warns(UserWarning, match="000002' is damaged.*Loaded the newest that is whole.*000001"):
        assert ax.load(tmp_path, Run(grown=False).grower) == {"epoch": 1}
    with pytest.raises(ax.GrowthError, match="An older one is whole"):
        ax.load(tmp_path, Run(grown=False).model)
    assert ax.load(tmp_path / "checkpoint-000001", Run(grown=False).grower) == {"epoch": 1}


def test_a_directory_without_a_checkpoint(tmp_path):
    load_refused(Run(grown=False), tmp_path, str(tmp_path))
    with pytest.raises(ax.GrowthError, match="nowhere"):
        ax.load(tmp_path / "nowhere", Run(grown=False).grower)


OTHERS = {
    "another width": (lambda: Run(dim=16, grown=False), r"growth 0 of the journal|another model"),
    "another depth": (lambda: Run(depth=4, grown=False), r"does not fit|another structure|another model"),
    "another optimizer": (
        lambda: Run(grown=False, optimizer=torch.optim.SGD),
        r"companions \(AdamW.*the Grower has \(SGD",
    ),
    "no average": (
        lambda: Run(grown=False, average=False),
        r"saved with the companions \(AdamW, Expo.*Build the same ones",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model(tmp_path, name):
    build, match = OTHERS[name]
    ax.save(Run().grower, tmp_path)
    load_refused(build(), tmp_path, match)


def test_a_checkpoint_of_another_model_into_a_bare_network(tmp_path):
    ax.save(Run().grower, tmp_path)
    for other in (Net(dim=16), Net(depth=4), torch.nn.Linear(3, 3)):
        before = picture(other)
        with pytest.raises(ax.GrowthError, match=r"journal|another model"):
            ax.load(tmp_path, other)
        assert_same(before, picture(other))
    with pytest.raises(ax.GrowthError, match=r"target is a dict; pass a Grower or an nn\.Module"):
        ax.load(tmp_path, {})


def test_a_run_that_has_grown_on_its_own(tmp_path):
    """Grown otherwise than the journal says: not mixed with what was saved."""
    ax.save(Run().grower, tmp_path)
    other = Run(grown=False)
    change = ax.grow(other.model, ax.Duplicate("blocks", by=3), *other.companions, probe=batch()[0])
    other.grower.record(change)
    load_refused(other, tmp_path, r"another structure|does not fit|another model")

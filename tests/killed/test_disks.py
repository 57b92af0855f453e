"""What a kill, a power cut or a full disk can leave on the disk: each such state goes on from a whole checkpoint."""

import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import shuffled
import torch
from kills import child

import auxin as ax
from auxin import typed
from auxin.checkpoint import directory, manifest

torch.set_num_threads(1)
ON_DISK = ("open", "os.", "shutil.")  # events of the interpreter's own audit


@pytest.fixture(scope="module")
def whole():
    """The losses of a run that nothing disturbs."""
    return list(shuffled.Run().train(60))


def saved(folder, *steps, keep_last=2):
    """A run that has been saved after each of these steps."""
    run = shuffled.Run()
    for number in steps:
        list(run.train(number))
        run.save(folder, keep_last)
    return run


def goes_on(folder, whole, step=None):
    """What lies there goes on as the undisturbed run did; the step of it, which is ``step`` if that is given."""
    with torch.random.fork_rng():  # another run may be under way in this process
        run = shuffled.Run()
        run.load(folder)
        begun = run.steps
        assert begun == (begun if step is None else step)
        assert list(run.train(begun + 20)) == whole[begun : begun + 20]
    return begun


def steps_in(folder):
    return typed.loads(directory.read(folder).bytes("run.json"), lambda name: name)["extra"]["steps"]


def names(folder):
    return sorted(os.listdir(folder))


# ---- a kill at each point of a save


def save_until(point, run, folder, keep_last):
    """Save, and be killed right before the ``point``-th thing that is asked of the disk."""
    count, fsync = 0, os.fsync

    def asked(event, _=()):
        nonlocal count
        count += event.startswith(ON_DISK)
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda descriptor: (asked("os.fsync"), fsync(descriptor))  # the one call that is not audited
    sys.addaudithook(asked)
    run.save(folder, keep_last)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_kill_before_each_thing_that_a_save_asks_of_the_disk(tmp_path, whole, keep_last):
    """Also while an old checkpoint is being removed, and what an earlier kill has left is swept up."""
    run, seen = saved(tmp_path / "before", 6, 9, keep_last=keep_last), []
    (tmp_path / "before" / f".tmp-{os.getpid()}-{directory._host()}-0badbeef").mkdir()
    list(run.train(12))
    while not seen or seen[-1] != "ended":
        folder = tmp_path / str(len(seen))
        shutil.copytree(tmp_path / "before", folder)
        status = os.waitpid(child(save_until, len(seen) + 1, run, folder, keep_last), 0)[1]
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL)
        for name in names(folder):
            if name.startswith("checkpoint-"):
                directory.read(folder / name)
        step = goes_on(folder, whole) if len(seen) % 5 == 0 else steps_in(folder)
        seen.append("ended" if code == 0 else step)
    print(f"keep_last={keep_last}: killed before each of {len(seen) - 1} things")
    last = next(place for place, step in enumerate(seen) if step == 12)  # from here on the new one has its name
    assert set(seen[:last]) == {9} and set(seen[last:-1]) == {12} and last >= 15 and len(seen) - last >= 10
    run.save(folder, keep_last)  # the next one sweeps up
    assert len(names(folder)) == keep_last and all(name.startswith("checkpoint-") for name in names(folder))


def test_what_a_process_of_the_same_number_left_is_swept_up(tmp_path):
    """In a container every start has the same process number."""
    left = tmp_path / f".tmp-{os.getpid()}-{directory._host()}-0badbeef"
    left.mkdir()
    saved(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-000001"]


# ---- what a power cut may leave


def cut(file, generator):
    file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])


def zeros(file, generator):
    """The size is there, the blocks are not."""
    size = file.stat().st_size
    begun = generator.randrange(size)
    file.write_bytes(file.read_bytes()[:begun] + bytes(size - begun))


def gone(file, _):
    file.unlink()


def bit(file, generator):
    data = bytearray(file.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("how", [cut, zeros, gone, bit])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over(tmp_path, whole, how):
    """With a warning that names it; the run then makes the lost steps again, to the bit."""
    saved(tmp_path, 6, 9)
    newest, generator = tmp_path / "checkpoint-000002", random.Random(3)
    for name in names(newest):
        file = newest / name
        before = file.read_bytes()
        how(file, generator)
        said = rf"checkpoint-000002' is damaged or was cut off: {name} .*Loaded the newest that is whole: .*-000001"
        with pytest.warns(UserWarning, match=said):
            goes_on(tmp_path, whole, 6)
        with pytest.raises(ax.GrowthError, match=f"damaged or was cut off: {name}.*An older one is whole"):
            ax.load(newest, shuffled.Run().grower)  # who names one wants that one
        with pytest.raises(ax.GrowthError, match="Nothing was loaded. An older one is whole"):
            ax.load(tmp_path, shuffled.Net())
        file.write_bytes(before)
    goes_on(tmp_path, whole, 9)


def test_without_a_whole_one_the_run_stays_as_it_is(tmp_path):
    saved(tmp_path, 6, 9)
    for name in names(tmp_path):
        gone(tmp_path / name / "model.safetensors", None)
    run = shuffled.Run()
    with pytest.raises(ax.GrowthError, match="There is no older one that is whole"):
        ax.load(tmp_path, run.grower)
    assert not len(run.grower.journal)


@pytest.mark.parametrize("what", ["newer version", "link", "not a file"])
def test_what_was_not_cut_off_is_not_passed_over(tmp_path, what):
    """A kill does not make these: going back without a question would hide a mistake."""
    saved(tmp_path, 6, 9)
    file = tmp_path / "checkpoint-000002" / "manifest.json"
    if what == "newer version":
        file.write_text(
            file.read_text().replace(f'"version": {manifest.VERSION}', f'"version": {manifest.VERSION + 1}')
        )
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere") if what == "link" else file.mkdir()
    with pytest.raises(ax.GrowthError, match="(a newer auxin|is a link|not an ordinary file).*An older one is whole"):
        ax.load(tmp_path, shuffled.Run().grower)


def test_killed_inside_the_first_save(tmp_path, whole):
    """The directory is there, a checkpoint is not: the loop begins."""
    (tmp_path / ".tmp-1-00000000-00000000").mkdir()
    goes_on(tmp_path, whole, 0)


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 640 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=640k", "none", place]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_in_the_middle_of_a_run(small_disk, whole):
    """The run goes on without saving, is killed, and goes on from the last checkpoint there was room for."""
    folder, run, refused, done = small_disk / "run", shuffled.Run(), [], 0
    for losses in run.train(40):
        assert losses == whole[run.steps - 1]
        if run.steps == 20:  # room for one more of today's size, not for one that has grown twice
            last = sum(file.stat().st_size for file in (folder / names(folder)[-1]).iterdir())
            taken = shutil.disk_usage(folder).free - last - 32_768
            (small_disk / "of somebody else").write_bytes(bytes(taken))
        if run.steps % 3 == 0:
            try:
                run.save(folder)
                done = run.steps
            except ax.GrowthError as error:
                refused.append(str(error))
    assert refused and 15 <= done < 39
    assert all("No space left" in text and "earlier checkpoints are as they were" in text for text in refused)
    assert all(name.startswith("checkpoint-") for name in names(folder))
    goes_on(folder, whole, done)
    (small_disk / "of somebody else").unlink()
    run.save(folder)
    goes_on(folder, whole, 40)

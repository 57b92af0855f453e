"""``auxin grow``: training goes on from its result to the bit as after the same growth in a run that goes on."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Net, build, train
from safetensors.torch import load_file
from torch import nn

import auxin as ax
from auxin.between_jobs import grow_checkpoint
from auxin.checkpoint.directory import read

pytestmark = pytest.mark.usefixtures("all_on_disk")
EDITS: dict[str, list[Any]] = {
    "copies": [ax.Duplicate("blocks")],
    "copies with their state": [ax.Duplicate("blocks", by=1, output="keep", state="copy")],
    "fresh": [ax.Duplicate("blocks", by=1, content="fresh", init="kaiming", output="zero")],
    "inserted": [ax.Insert("blocks", functools.partial(nn.Linear, 24, 24), init="identity")],
    "behind": [ax.After("inp", functools.partial(nn.Linear, 24, 24))],
    "wider": [ax.Widen("blocks.*.up", by=8)],
    "split": [ax.Widen("blocks.*.up", by=8, init="split", noise=0.01)],
    "the stream": [ax.Widen("inp", by=8, init="random")],
    "twice": [ax.Widen("blocks.*.up", by=8), ax.Duplicate("blocks", by=1)],
    "as one": [[ax.Duplicate("blocks", by=1), ax.Widen("blocks.*.up", by=8)]],
    "less": [ax.Remove("blocks.1")],
}


def parted(path: Path, build: Any = build, steps: int = 6) -> None:
    """A run that was saved some steps after a growth."""
    grower = build()
    train(grower, range(3))
    grower.grow(ax.Duplicate("blocks", by=1))
    train(grower, range(3, steps))
    ax.save(grower, path, extra={"step": steps, "state": torch.arange(3)})


def alike(ours: Path, theirs: Path) -> None:
    """Two checkpoints hold the same, but for how long something took, and what of memory and place torch tells of."""
    names = [sorted(read(path).manifest) for path in (ours, theirs)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            tensors = [load_file(read(path).path / name) for path in (ours, theirs)]
            assert tensors[0].keys() == tensors[1].keys()
            for key, tensor in tensors[0].items():
                assert tensor.dtype == tensors[1][key].dtype and torch.equal(tensor, tensors[1][key]), (name, key)
        else:
            texts = [json.loads(read(path).bytes(name)) for path in (ours, theirs)]
            assert without_times(texts[0]) == without_times(texts[1]), name


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if key not in ("seconds", "summary")}
    return [without_times(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("edits", EDITS.values(), ids=list(EDITS))
def test_weights_state_and_losses_are_those_of_the_growth_in_the_run(tmp_path: Path, edits: list[Any]) -> None:
    check(tmp_path, edits, build)


@pytest.mark.parametrize("optimizer", ["SGD", "Adafactor"])
def test_another_optimizer(tmp_path: Path, optimizer: str) -> None:
    check(tmp_path, [ax.Widen("blocks.*.up", by=8), ax.Duplicate("blocks")], functools.partial(build, optimizer))


def check(path: Path, edits: list[Any], build: Any) -> None:
    parted(path / "in", build)
    live = build()
    ax.load(path / "in", live)
    for edit in edits:
        live.grow(edit)
    ax.save(live, path / "live", extra={"step": 6, "state": torch.arange(3)})
    losses = train(live, range(6, 16))
    before = {file: file.read_bytes() for file in (path / "in").rglob("*") if file.is_file()}
    torch.manual_seed(11)  # random numbers of this process go nowhere
    told = grow_checkpoint(path / "in", path / "out", build, edits)
    alike(path / "out", path / "live")
    assert {file: file.read_bytes() for file in (path / "in").rglob("*") if file.is_file()} == before
    assert len(told.changes) == len(edits) and sorted(file.name for file in path.iterdir()) == ["in", "live", "out"]
    job = build()
    extra = ax.load(path / "out", job)
    assert extra["step"] == 6 and torch.equal(extra["state"], torch.arange(3))
    assert train(job, range(6, 16)) == losses
    assert len(job.journal) == 1 + len(edits)


def test_large_tensors_of_the_real_sizes_take_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wide = functools.partial(build, dim=520)  # of which weights are above a megabyte, and others are not
    parted(tmp_path / "in", wide)
    live = wide()
    ax.load(tmp_path / "in", live)
    for edit in EDITS["twice"]:
        live.grow(edit)
    ax.save(live, tmp_path / "live", extra={"step": 6, "state": torch.arange(3)})
    grow_checkpoint(tmp_path / "in", tmp_path / "out", wide, EDITS["twice"])
    alike(tmp_path / "out", tmp_path / "live")


def test_what_the_machine_of_the_run_had_stays_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scaled(enabled: bool = True) -> ax.Grower:
        return build(more=(torch.amp.GradScaler("cpu", init_scale=64.0, enabled=enabled),))

    parted(tmp_path / "in", scaled)
    found = json.loads(read(tmp_path / "in").bytes("run.json"))
    grow_checkpoint(tmp_path / "in", tmp_path / "out", functools.partial(scaled, False), [ax.Duplicate("blocks")])
    after = json.loads(read(tmp_path / "out").bytes("run.json"))
    assert after["companions"][3] == found["companions"][3] and after["random"] == found["random"]


def test_each_rank_gets_its_own_back(tmp_path: Path) -> None:
    from auxin.checkpoint import directory, each_rank

    parted(tmp_path / "first")
    whole = read(tmp_path / "first")
    files: dict[str, Any] = {n: whole.tensors(n) if e.layout else whole.bytes(n) for n, e in whole.manifest.items()}
    own = each_rank.dumped([{"random": None, "extra": {"rank": rank}} for rank in range(2)])
    directory.write(tmp_path / "in", {**files, **own})
    grow_checkpoint(tmp_path / "in", tmp_path / "out", build, [ax.Duplicate("blocks", by=1)])
    assert read(tmp_path / "out").bytes(each_rank.FILE) == own[each_rank.FILE]


def test_one_checkpoint_of_several_is_named(tmp_path: Path) -> None:
    parted(tmp_path / "in", steps=4)
    parted(tmp_path / "in", steps=6)
    told = grow_checkpoint(tmp_path / "in/checkpoint-000001", tmp_path / "out", build, [ax.Duplicate("blocks", by=1)])
    assert told.source.name == "checkpoint-000001" and ax.load(tmp_path / "out", build())["step"] == 4


def test_a_network_for_inference_reads_the_result(tmp_path: Path) -> None:
    parted(tmp_path / "in")
    grow_checkpoint(tmp_path / "in", tmp_path / "out", build, [ax.Duplicate("blocks", by=1)])
    net = Net()
    ax.load(tmp_path / "out", net)
    assert len(net.blocks) == 4

"""The files of a run: what is written, what is not, and that training never notices."""

import errno
import gc
import json
import math
import os
import random
import warnings

import pytest
import torch
from torch import nn

import anew
import auxin as ax
from auxin.flow import STEPS
from auxin.limit import flops_per_sample
from auxin.logbook import Logbook

torch.set_num_threads(1)
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
D = ax.Duplicate("blocks", by=1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block()]), nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    def __init__(self, log=None, **options):
        torch.manual_seed(0)
        self.model = Net()
        self.opt = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        words = {"edits": D, "when": ax.when.at([3]), "probe": X[:16], "log": log, **options}
        self.grower = ax.Grower(self.model, self.opt, **words)

    def train(self, steps, metric=None):
        """Batches and dropout come from the global generators; a reading after every second step."""
        losses = []
        for step in range(steps):
            rows = torch.randint(0, 64, (32,)) + 0 * random.randrange(2)
            self.opt.zero_grad()
            loss = nn.functional.mse_loss(self.model(X[rows]), Y[rows])
            loss.backward()
            self.opt.step()
            losses.append(loss.item())
            if step % 2:
                self.grower.step(loss.item() if metric is None else metric, accuracy=0.5)
        return losses


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def of_kind(folder, kind):
    return [line for line in lines(folder) if line["kind"] == kind]


# What is written


def test_the_lines_of_a_run(tmp_path):
    run = Run(tmp_path / "run")
    run.train(10)
    kinds = [line["kind"] for line in lines(tmp_path / "run")]
    assert kinds == ["reading"] * 3 + ["decision", "growth"] + ["flow", "flow", "reading"] * 2
    reading = of_kind(tmp_path / "run", "reading")[3]
    keys = ["kind", "call", "step", "seconds", "flops", "parameters", "metric", "metrics"]
    assert list(reading) == keys and (reading["call"], reading["step"]) == (4, 8)
    assert reading["metrics"] == {"accuracy": 0.5} and reading["parameters"] == 569
    (decision,) = of_kind(tmp_path / "run", "decision")
    assert decision == {
        **{"kind": "decision", "call": 3, "step": 6, "seconds": decision["seconds"], "fired": True},
        **{"chosen": repr(D), "waiting": None, "reason": "at(counts=[3])"},
    }
    (growth,) = of_kind(tmp_path / "run", "growth")
    entry = run.grower.journal.entries[0]
    assert (growth["number"], growth["call"], growth["step"]) == (0, 3, 6) and growth["line"] == entry.summary
    assert growth["entry"] == run.grower.journal.to_json()[0]
    assert growth["max_difference"] == 0 and growth["gradient_ratio"] == entry.gradient_ratio
    assert growth["gradient_ratios"] == {"blocks.1": entry.gradient_ratio} and growth["parameters"] == 569
    flows = of_kind(tmp_path / "run", "flow")
    assert [(f["growth"], f["step"], list(f["ratios"]), f["dead"]) for f in flows] == [
        (0, step, ["blocks.1"], []) for step in (7, 8, 9, 10)
    ]
    journal = json.loads((tmp_path / "run" / "journal.json").read_text())
    assert journal["format"] == 1 and journal["entries"] == run.grower.journal.to_json()


def test_training_is_bit_for_bit_the_same_with_and_without_a_log(tmp_path):
    seen = []
    for log in (None, tmp_path / "run"):
        random.seed(0)
        run = Run(log)
        losses = run.train(6 + 2 * STEPS)
        state = {name: p.clone() for name, p in run.model.named_parameters()}
        seen.append((losses, state, torch.get_rng_state(), random.getstate(), run.opt.state_dict()["state"]))
    (a, b) = seen
    assert a[0] == b[0] and torch.equal(a[2], b[2]) and a[3] == b[3]
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    assert all(torch.equal(a[4][i][k], b[4][i][k]) for i in a[4] for k in a[4][i])
    assert len(of_kind(tmp_path / "run", "flow")) == STEPS


def test_flops_are_three_forwards_a_sample_of_the_network_as_it_was(tmp_path):
    run = Run(Logbook(tmp_path / "run", batch=32))
    small = flops_per_sample(run.model, X[:16])
    run.train(10)
    large = flops_per_sample(run.model, X[:16])
    expected = [3 * 32 * (min(step, 6) * small + max(0, step - 6) * large) for step in (2, 4, 6, 8, 10)]
    assert [line["flops"] for line in of_kind(tmp_path / "run", "reading")] == expected and large > small
    run = Run(tmp_path / "other")
    run.train(2)
    assert of_kind(tmp_path / "other", "reading")[0]["flops"] == 3 * 16 * 2 * small  # as many samples as the probe


@pytest.mark.parametrize("probe", [None, lambda: X[:16]], ids=["none", "callable"])
def test_flops_that_cannot_be_known_are_null(tmp_path, probe):
    run = Run(tmp_path / "run", probe=probe, edits=ax.Duplicate("blocks", by=1, output="keep"))
    run.train(8)
    assert [line["flops"] for line in of_kind(tmp_path / "run", "reading")] == [None] * 4


def test_a_callable_probe_is_not_called_for_the_log(tmp_path):
    calls = []
    run = Run(tmp_path / "run", probe=lambda: calls.append(1) or X[:16], when=ax.when.at([100]))
    run.train(6)
    assert calls == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    run = Run(tmp_path / "run", when=ax.when.every(1))
    run.train(1)
    run.grower.step(value, other=value)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    for line in text.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    reading = of_kind(tmp_path / "run", "reading")[0]
    assert reading["metric"] is None and reading["metrics"] == {"other": None}
    assert len(of_kind(tmp_path / "run", "growth")) == 1


def test_a_decision_that_waits_says_why(tmp_path):
    run = Run(tmp_path / "run", when=ax.when.at([1]))
    nn.functional.mse_loss(run.model(X), Y).backward()
    assert run.grower.step(1.0) is None
    run.opt.step()
    assert run.grower.step(1.0) is not None
    decisions = of_kind(tmp_path / "run", "decision")
    told = [(line["call"], line["chosen"], line["waiting"] and line["waiting"][:8]) for line in decisions]
    assert told == [(1, repr(D), None), (1, repr(D), "not now:")]
    assert of_kind(tmp_path / "run", "growth")[0]["call"] == 2


def test_undo_and_probation_are_told_apart(tmp_path):
    run = Run(tmp_path / "run", when=ax.when.at([4]), probation=ax.Probation(calls=2, window=3))
    for metric in (4.0, 3.0, 2.0, 1.0, 9.0, 9.0, 9.0):
        run.train(2, metric)
    run.grower.grow(D)
    run.grower.undo()
    undone = of_kind(tmp_path / "run", "undone")
    told = [(line["number"], line["why"]) for line in undone]
    assert told == [(0, "probation: 10 behind the run without it"), (0, "undo()")]
    assert (undone[0]["call"], undone[0]["step"]) == (6, 12)
    assert json.loads((tmp_path / "run" / "journal.json").read_text())["entries"] == []
    readings = of_kind(tmp_path / "run", "reading")
    flops = [line["flops"] for line in readings]
    assert flops == sorted(flops) and flops[-1] > flops[-2]  # what was spent is spent
    assert readings[-1]["parameters"] == 289


def test_nothing_is_written_in_a_trial(tmp_path):
    run = Run(tmp_path / "run")
    run.train(4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with run.grower.trial(D):
        run.train(STEPS)
        run.grower.grow(D)
        run.grower.undo()
        run.grower.decide(1.0)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "run" / "journal.json").exists()


def test_growths_by_hand_and_surgeries_are_written(tmp_path):
    run = Run(tmp_path / "run")
    run.grower.grow(D)
    with run.grower.surgery():
        run.model.blocks.append(Block())
    run.grower.record(ax.grow(run.model, D, run.opt, probe=X))
    assert [line["number"] for line in of_kind(tmp_path / "run", "growth")] == [0, 1, 2]


def test_a_growth_that_is_refused_is_not_written(tmp_path):
    def refuse(change):
        raise ZeroDivisionError

    run = Run(tmp_path / "run", on_growth=refuse)
    with pytest.raises(ZeroDivisionError):
        run.grower.grow(D)
    run.grower.step(1.0)
    assert [line["kind"] for line in lines(tmp_path / "run")] == ["reading"]


# Resumed runs, and runs beside each other


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path):
    run = Run(tmp_path / "run")
    run.train(10)
    ax.save(run.grower, tmp_path / "saved")
    run.train(4)  # lost in a crash
    before = of_kind(tmp_path / "run", "reading")
    run.grower.log.close()
    again = Run(tmp_path / "run")
    ax.load(tmp_path / "saved", again.grower)
    again.train(4)
    (resumed,) = of_kind(tmp_path / "run", "resumed")
    assert (resumed["call"], resumed["step"]) == (5, 10)
    assert before[4]["seconds"] <= resumed["seconds"]
    after = of_kind(tmp_path / "run", "reading")
    assert after[:7] == before and [line["call"] for line in after[7:]] == [6, 7]
    assert [line["flops"] for line in after[7:]] == [line["flops"] for line in before[5:]]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip([resumed, *after[7:]], after[7:], strict=False))


def test_a_rewound_run_says_so(tmp_path):
    run = Run(tmp_path / "run", when=ax.when.at([100]))
    run.train(4)
    ax.save(run.grower, tmp_path / "saved")
    run.train(4)
    ax.load(tmp_path / "saved", run.grower)
    run.train(2)
    kinds = [(line["kind"], line["call"]) for line in lines(tmp_path / "run")]
    assert kinds == [*(("reading", call) for call in (1, 2, 3, 4)), ("resumed", 2), ("reading", 3)]


def test_a_load_that_fails_resumes_nothing(tmp_path):
    run = Run(tmp_path / "run")
    run.train(4)
    state = run.grower.state_dict()
    with pytest.raises(ax.GrowthError):
        run.grower.load_state_dict({**state, "history": 3})
    with pytest.raises(ZeroDivisionError), run.grower.or_as_before():
        run.grower.load_state_dict(state)
        raise ZeroDivisionError
    run.train(2)
    assert not of_kind(tmp_path / "run", "resumed")


def test_another_run_begins_files_of_its_own(tmp_path):
    for number in range(3):
        run = Run(tmp_path)
        run.train(6 + 2 * number)
        run.grower.log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("journal-1.json", "journal-2.json", "journal.json", "metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")
    ]
    counts = [sum(line["kind"] == "reading" for line in lines(tmp_path, f"metrics{n}.jsonl")) for n in ("-1", "-2", "")]
    assert counts == [3, 4, 5]


def test_a_run_that_says_nothing_leaves_the_files_of_the_last_one(tmp_path):
    run = Run(tmp_path)
    run.train(2)
    run.grower.log.close()
    Run(tmp_path)
    assert len(lines(tmp_path)) == 1


def test_two_runs_at_once_in_one_directory_are_refused(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(
        ax.GrowthError, match=r"another run is writing.* one of its own, or call grower\.log\.close\(\)"
    ):
        Run(tmp_path)
    run.train(2)
    assert len(lines(tmp_path)) == 1
    run.grower.log.close()
    Run(tmp_path).train(2)
    run.train(2)  # closed: silent
    assert len(lines(tmp_path)) == 1


def test_a_grower_that_is_dropped_or_a_process_that_is_killed_lets_go(tmp_path):
    run = Run(tmp_path)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    del run
    gc.collect()
    if open_files is not None:
        assert len(os.listdir("/proc/self/fd")) < open_files
    code = (
        "import os, sys; from auxin.logbook import Logbook; from auxin.flow import Flow\n"
        "book = Logbook(sys.argv[1]); book.flow(Flow(0, 1, {})); os.kill(os.getpid(), 9)"
    )
    assert anew.run("-c", code, tmp_path).returncode == -9
    assert len(lines(tmp_path)) == 1
    Run(tmp_path).train(2)


def test_a_forked_child_does_not_let_go(tmp_path):
    run = Run(tmp_path)
    code = os.fork()
    if code == 0:
        run.grower.log.close()
        os._exit(0)
    os.waitpid(code, 0)
    with pytest.raises(ax.GrowthError, match="another run is writing"):
        Run(tmp_path)


# When writing fails


def test_a_cut_last_line_is_closed_by_the_next_opening(tmp_path):
    run = Run(tmp_path)
    run.train(4)
    ax.save(run.grower, tmp_path / "saved")
    run.grower.log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "reading", "call": 3, "st')
    again = Run(tmp_path)
    ax.load(tmp_path / "saved", again.grower)
    again.train(2)
    text = path.read_text().splitlines()
    broken = []
    for number, line in enumerate(text):
        try:
            json.loads(line)
        except ValueError:
            broken.append(number)
    assert broken == [2] and json.loads(text[3])["kind"] == "resumed" and path.read_text().endswith("\n")


def test_binary_junk_in_the_place_of_a_log_is_survived(tmp_path):
    run = Run(tmp_path)
    run.train(4)
    ax.save(run.grower, tmp_path / "saved")
    run.grower.log.close()
    (tmp_path / "metrics.jsonl").write_bytes(b'\x00\xff[1, 2]\n[1, 2]\n7\n{"kind": "reading"}\n' + bytes(range(256)))
    again = Run(tmp_path)
    ax.load(tmp_path / "saved", again.grower)
    again.train(2)
    text = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    kinds = [json.loads(line)["kind"] for line in text if line.startswith(b'{"kind": "re') and b"call" in line]
    assert kinds == ["resumed", "reading"]


def test_a_full_disk_brings_one_warning_and_no_cut_line(tmp_path, monkeypatch):
    run, plain = Run(tmp_path), Run()
    random.seed(0)
    torch.manual_seed(1)
    expected = plain.train(12)
    torch.manual_seed(1)
    losses = run.train(2)
    real, full = os.write, [True]

    def write(file, data):
        if not full[0]:
            return real(file, data)
        if len(data) > 10:
            return real(file, data[:10])  # as much as there is room for
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses += run.train(4)
        full[0] = False
        losses += run.train(6)
    told = [str(w.message) for w in caught if "log in" in str(w.message)]
    assert len(told) == 1 and "No space left on device" in told[0] and "Training goes on" in told[0]
    assert losses == expected
    calls = [line["call"] for line in of_kind(tmp_path, "reading")]  # every line parses
    assert calls == [1, 4, 5, 6] and len(run.model.blocks) == 2


def test_a_lost_permission_does_not_stop_training(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    run = Run(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.warns(UserWarning, match="cannot be written .*Permission denied"):
        run.train(2)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.train(6)
    assert [line["call"] for line in of_kind(tmp_path, "reading")] == [2, 3, 4]
    assert not (tmp_path / "journal.json").exists()


def test_a_directory_that_cannot_be_used_is_refused_at_the_door(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ax.GrowthError, match=r"log='.*file.*': this directory cannot be written to"):
            Run(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_grower_that_is_refused_holds_no_directory(tmp_path):
    with pytest.raises(ax.GrowthError):
        Run(tmp_path, edits=3)
    Run(tmp_path).train(2)


@pytest.mark.parametrize("batch", [0, -1, 2.5, True, "many"])
def test_a_bad_batch_is_refused(tmp_path, batch):
    with pytest.raises(ax.GrowthError, match=r"Logbook\(batch=.*samples in one optimizer step"):
        Logbook(tmp_path, batch=batch)
    Logbook(tmp_path)


@pytest.mark.parametrize("log", [3, 2.5, ["run", 3], print, True])
def test_a_log_that_is_no_path_is_refused(log):
    with pytest.raises(ax.GrowthError, match=r"log=.* pass a directory, e\.g\. log='run'"):
        Run(log)


def test_a_run_does_not_depend_on_its_log(tmp_path):
    run = Run(tmp_path / "run")
    run.train(10)
    ax.save(run.grower, tmp_path / "saved")
    expected = run.train(4)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    again = Run()
    ax.load(tmp_path / "saved", again.grower)
    assert again.train(4) == expected

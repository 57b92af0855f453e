"""Damaged checkpoints and hostile journals: found before anything is loaded, and nothing runs that they name."""

import copy
import json
import random
import sys

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.journal import Journal
from auxin.refs import Allowed

torch.set_num_threads(1)

DAMAGES = 1000
WATCHED = ("import", "open", "os.system", "subprocess.Popen", "os.exec", "os.remove", "os.rename", "socket.connect")
HOSTILE = [
    "os:system",
    "posix:system",
    "builtins:eval",
    "builtins:exec",
    "subprocess:Popen",
    "torch.nn:functional.torch.os.system",
    "torch.nn.functional:torch.os.system",
    "torch:load",
    "torch.hub:load",
    "torch.nn:Module.__init__",
    "torch.nn:Linear.forward",
    "auxin.refs:importlib.import_module",
    "auxin.checkpoint.directory:shutil.rmtree",
    "pickle:loads",
    "antigravity:anything",
    "this:d",
    "torch.nn.modules.linear:Linear.__class__",
    "__main__:__builtins__",
    "sys:modules",
    "",
    ":",
    "torch.nn:",
    ":Linear",
    "torch.nn.modules.linear:Linear",
    "torch.nn.modules.lazy:LazyModuleMixin",
    "auxin.edits.duplicate:Duplicate",
    "auxin.grower:Grower",
]
STRANGE = [None, True, -1, 10**400, 1e308, "", "x" * 5000, [], {}, [[[[]]]], {"$": "nope"}, {"$": "tuple", "v": 3}]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def build():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.BatchNorm1d(4), Block())
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    average = torch.optim.swa_utils.AveragedModel(model)
    edits = [ax.Duplicate("", order=[0, 0, 1, 2], output="keep"), ax.Insert("", Block)]
    options = {"edits": edits, "when": ax.when.plateau(patience=2), "probe": torch.randn(4, 4)}
    return ax.Grower(model, optimizer, scheduler, average, **options)


def grown(path):
    grower = build()
    optimizer, scheduler, average = grower.companions
    for edit in grower.edits():
        optimizer.zero_grad()
        grower.grow(edit)
        grower.model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(grower.model)
        grower.step(1.0)
    optimizer.zero_grad()
    ax.save(grower, path, extra={"epoch": 3, "names": ("a", "b"), "best": float("inf")})
    return grower


def values(grower):
    optimizer, scheduler, average = grower.companions
    tensors = [*grower.model.state_dict().values(), *average.state_dict().values()]
    data = (optimizer.state_dict(), scheduler.state_dict(), grower.state_dict(), list(grower.model.state_dict()))
    return [t.clone() for t in tensors], copy.deepcopy(data), torch.get_rng_state()


def same(a, b):
    equal = len(a[0]) == len(b[0]) and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    return equal and repr(a[1]) == repr(b[1]) and torch.equal(a[2], b[2])


def test_every_cut_and_every_flipped_bit_is_found_and_nothing_is_loaded(tmp_path, record_property):
    grown(tmp_path)
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    whole = {file: file.read_bytes() for file in files}
    target = build()
    before, generator, found = values(target), random.Random(0), 0
    for number in range(DAMAGES):
        file = files[number % len(files)]
        raw = bytearray(whole[file])
        if generator.random() < 0.5:
            raw = raw[: generator.randrange(len(raw))]
        else:
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        file.write_bytes(bytes(raw))
        with pytest.raises(ax.GrowthError):
            ax.load(tmp_path, target)
        found += 1
        file.write_bytes(whole[file])
        if number % 100 == 99:
            assert same(before, values(target))
    record_property("damages found", f"{found} of {DAMAGES} in {len(files)} files")
    assert ax.load(tmp_path, target) == {"epoch": 3, "names": ("a", "b"), "best": float("inf")}


def places(value, at=()):
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*at, index))


def mutated(journal, generator):
    """A journal with one to three places replaced, dropped, doubled or renamed."""
    journal = copy.deepcopy(journal)
    for _ in range(generator.randint(1, 3)):
        *way, last = generator.choice([place for place in places(journal) if place])
        holder = journal
        for step in way:
            holder = holder[step]
        kind = generator.random()
        if kind < 0.35:
            holder[last] = generator.choice(HOSTILE)
        elif kind < 0.5:
            holder[last] = {"$": "ref", "v": generator.choice(HOSTILE)}
        elif kind < 0.7:
            holder[last] = copy.deepcopy(generator.choice(STRANGE))
        elif kind < 0.85:
            del holder[last]
        elif isinstance(holder, dict):
            holder[generator.choice(["type", "at", "$", "__class__", "edit", "index"])] = holder[last]
        else:
            holder.append(holder[last])
    return journal


class Watch:
    """Everything that an audit hook sees while it looks."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event, args):
        if not self.on or event not in WATCHED:
            return
        source = event == "open" and str(args[0]).endswith(".py") and "r" in str(args[1])
        if not source:  # a warning that is shown quotes the line it comes from
            self.seen.append((event, str(args[:2])))


def attack(count, tmp_path):
    journal = json.loads((next(grown_path(tmp_path).glob("checkpoint-*")) / "journal.json").read_text())["entries"]
    generator, watch, refused, rebuilt = random.Random(1), Watch(), 0, 0
    modules = set(sys.modules)
    for _ in range(count):
        text = mutated(journal, generator)
        model = build_model()
        names = list(model.state_dict())
        watch.on = True
        try:
            entries = Journal.from_json(text, Allowed.of(model, [Block]))
            ax.replay(model, entries)
            rebuilt += 1
        except ax.GrowthError:
            refused += 1
            assert list(model.state_dict()) == names
        finally:
            watch.on = False
    foreign = [name for name in set(sys.modules) - modules if not name.startswith(("torch.nn", "auxin"))]
    assert not foreign and not watch.seen
    return refused, rebuilt


def grown_path(tmp_path):
    grown(tmp_path)
    return tmp_path


def build_model():
    return nn.Sequential(Block(), nn.BatchNorm1d(4), Block())


def test_mutated_journals_bring_nothing_but_errors(tmp_path, record_property):
    refused, rebuilt = attack(3000, tmp_path)
    record_property("journals", f"{refused} refused, {rebuilt} harmless")
    assert refused > 1500


@pytest.mark.long
def test_a_hundred_thousand_mutated_journals(tmp_path, record_property):
    refused, rebuilt = attack(100_000, tmp_path)
    record_property("journals", f"{refused} refused, {rebuilt} harmless")
    assert refused > 50_000


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_reference_resolves(name, tmp_path):
    allowed = Allowed.of(build_model(), [Block])
    harmless = ("torch.nn.modules.linear:Linear", "auxin.edits.duplicate:Duplicate")
    if name in harmless:
        assert isinstance(allowed.resolve(name), type)
        return
    with pytest.raises(ax.GrowthError):
        allowed.resolve(name)


def test_a_metaclass_or_a_property_does_not_run():
    ran = []

    class Meta(type):
        def __getattr__(cls, name):
            ran.append(name)
            return nn.Linear

    class Trap(nn.Module, metaclass=Meta):
        @property
        def inner(self):
            ran.append("inner")

    Trap.__module__, Trap.__qualname__ = __name__, "Trap"
    sys.modules[__name__].Trap = Trap
    for name in (f"{__name__}:Trap.hidden", f"{__name__}:Trap.inner.fget"):
        with pytest.raises(ax.GrowthError):
            Allowed.of(nn.Sequential(Block()), []).resolve(name)
    assert not ran

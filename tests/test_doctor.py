"""``auxin doctor``: what it says works, works, what it says does not, does not, and nothing is changed by asking."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import auxin as ax
from auxin.cli import main
from auxin.doctor import examine

BUILD = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.out = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.Sequential(Block(8), Block(8))

    def forward(self, x):
        return self.out(self.blocks(self.inp(x)))


def build():
    model = Net()
    return model, torch.optim.AdamW(model.parameters()), torch.randn(4, 8)


def unknown():
    model, opt, x = build()
    return model, opt, object(), x


def a_grower():
    import auxin as ax

    model, opt, x = build()
    grower = ax.Grower(model, opt, edits=ax.Duplicate("blocks"), when=ax.when.every(1), probe=x)
    return model, opt, grower


def of_another():
    return Net(), *build()[1:]


def alone():
    model, _, x = build()
    return model, x


def without_batch():
    return build()[:2]


class Imports(Net):
    def forward(self, x):
        from a_users_helper import same

        return same(super().forward(x))


def imports():
    model = Imports()
    return model, torch.optim.AdamW(model.parameters()), torch.randn(4, 8)


def raises():
    raise ValueError("no data here")


def leaves():
    raise SystemExit(0)


def elsewhere():
    import os, tempfile
    os.chdir(tempfile.gettempdir())
    return build()
"""


class Shares(nn.Module):
    """A width that a constant in forward holds fixed, and an LSTM."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm, self.out = nn.Embedding(10, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(3, 2)

    def forward(self, ids):
        return self.out(self.lstm(self.table(ids))[0].reshape(len(ids), -1, 3))


def networks():
    yield nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(4, 8)
    yield (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        torch.randn(2, 1, 6, 6),
    )
    yield nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), torch.randn(2, 3, 8)
    yield Shares(), torch.randint(10, (2, 4))


@pytest.mark.parametrize("number", range(4))
def test_what_it_says_is_so(number: int) -> None:
    torch.manual_seed(0)
    model, x = list(networks())[number]
    opt = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    found = examine(model, opt, probe=x)
    print(found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.edits and found.works and found.companions[0].works
    for one in found.edits:
        net = copy.deepcopy(model)
        if one.works:
            ax.grow(net, one.edit, torch.optim.AdamW(net.parameters()), probe=x)
        else:
            with pytest.raises(ax.GrowthError):
                ax.grow(net, one.edit, torch.optim.AdamW(net.parameters()), probe=x)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_users_file.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("a_users_file", None)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    assert main(["doctor", "a_users_file:build"]) == 0
    told, trying = capsys.readouterr()
    assert trying.splitlines()[0] == "trying Duplicate('blocks', by=1)"
    assert "works     Duplicate('blocks', by=1): +296 parameters" in told and "AdamW: is followed" in told
    assert "auxin.Grower(model, ..., edits=auxin.Duplicate('blocks', by=1)" in told and len(told.splitlines()) <= 12
    assert main(["doctor", "a_users_file:build", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["works"] and {one["subject"] for one in plain["edits"]} >= {"Duplicate('blocks', by=1)"}
    assert sys.path == path


def test_a_forward_that_imports_from_the_same_folder(folder: Path) -> None:
    (folder / "a_users_helper.py").write_text("def same(x):\n    return x\n")
    path = list(sys.path)
    assert main(["doctor", "a_users_file:imports"]) == 0
    assert sys.path == path
    del sys.modules["a_users_helper"]


def test_a_factory_that_goes_to_another_directory(folder: Path) -> None:
    path = list(sys.path)
    assert main(["doctor", "a_users_file:elsewhere"]) == 0
    assert sys.path == path


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("a_users_file:unknown", 1, "builtins.object is not a companion"),
        (
            "a_users_file:raises",
            2,
            "it does not build: ValueError: no data here. The factory is called without arguments",
        ),
        ("a_users_file:leaves", 2, "it does not build: SystemExit: 0"),
        (
            "a_users_file:nothing",
            2,
            "it does not build: AttributeError: module 'a_users_file' has no attribute 'nothing'",
        ),
        ("no_such_file:build", 2, "it does not build: ModuleNotFoundError: No module named 'no_such_file'"),
        ("a_users_file:without_batch", 2, "it returns (Net, AdamW). Return the model"),
        ("a_users_file:of_another", 1, "does not  together: verify found"),
        ("a_users_file:a_grower", 0, "works     AdamW: is followed"),
        ("a_users_file:alone", 0, "(no optimizer was returned, so what becomes of its state was not tried)"),
        ("a_users_file.py:build", 2, "a module is written without .py: a_users_file:build"),
        ("a_users_file", 2, "write it as module:factory"),
    ],
)
def test_what_cannot_be_examined(
    place: str, status: int, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", place]) == status
    told = capsys.readouterr()
    assert words in told.out + told.err


def test_gradients_that_a_factory_left_are_in_nobodys_way() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 4)
    model(x).sum().backward()
    held = [p.grad for p in model.parameters()]
    found = examine(model, torch.optim.AdamW(model.parameters()), probe=x)
    assert found.works and all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.patch, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1))


def test_a_width_is_named_by_a_layer_where_one_makes_it() -> None:
    found = examine(WithToken(), probe=torch.randn(4, 3, 4))
    assert [one.subject for one in found.edits] == ["Widen('patch', by=2)"]


class PostNorm(nn.Module):
    """What is added to the output of a norm, whose gains are all alike as long as nothing has been trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.branch, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.first, self.norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.inp(x))
        return self.out(self.norm(x + self.branch(x)))


def test_a_stream_that_grows_only_until_its_gains_have_been_trained_does_not_work() -> None:
    torch.manual_seed(0)
    model, x = PostNorm(), torch.randn(4, 4)
    assert ax.grow(model, ax.Widen("inp", by=2), probe=x, dry_run=True).preserves
    before = copy.deepcopy(model.state_dict())
    found = examine(model, probe=x)
    assert found.edits[-1].subject == "Widen('inp', to=16, init='tile')" and found.edits[-1].works and not found.widths
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.first.weight += 0.1 * torch.randn(8)
    with pytest.raises(ax.GrowthError, match="what first gives, with a gain for each entry, is added"):
        ax.grow(model, ax.Widen("inp", by=2), probe=x)
    assert ax.grow(model, found.edits[-1].edit, probe=x).preserves

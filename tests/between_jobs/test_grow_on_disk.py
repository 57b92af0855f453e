"""Tensors in files: whatever operations do, values, shapes and strides are what they are in memory."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import build
from torch import Tensor, nn

import auxin as ax
from auxin.between_jobs import grow_checkpoint
from auxin.checkpoint import tensors
from auxin.on_disk import OnDisk

pytestmark = pytest.mark.usefixtures("all_on_disk")
A = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
B = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))


def written(a: Tensor, b: Tensor) -> list[Tensor]:
    part = a[3:9]
    part.mul_(2)
    a.t()[1:3].add_(b[1:3])
    torch._foreach_add_([a, b], 1.0)
    b.zero_()
    b[:, 1] = 5
    return [a, b, part]


def autograd(a: Tensor, b: Tensor) -> list[Tensor]:
    x, y = a.clone().requires_grad_(), nn.Parameter(b.clone())
    (x @ y).tanh().sum().backward()
    assert x.grad is not None and y.grad is not None
    norms = torch._foreach_norm([x.grad, y.grad])
    return [x.grad, y.grad, *norms]


OPERATIONS: dict[str, Callable[[Tensor, Tensor], list[Tensor]]] = {
    "new": lambda a, b: [a + 1, a @ b, torch.cat([a, b.t()]), a.index_select(0, torch.tensor([3, 1, 2]))],
    "views": lambda a, b: [a.t(), a[2:7, ::3], a.unsqueeze(0).expand(3, -1, -1), a.clone().t()],
    "written": written,
    "copies are apart": lambda a, b: [c := a.clone(), c.fill_(0), a, d := b.clone(), d.fill_(-1.0), b],
    "copies of copies": lambda a, b: [c := a.clone().clone(), c.add_(1), c.zero_(), c.clone(), c.clone().add_(2), a],
    "empty": lambda a, b: [torch.empty_like(a).copy_(a), torch.zeros(50, 60), torch.zeros(50, 60).add_(1)],
    "autograd": autograd,
    "deepcopy": lambda a, b: [*copy.deepcopy(nn.ParameterList([a, b])).parameters()],
    "strides": lambda a, b: [a.t().clone(), a.view(2, 5, 4, 30).to(memory_format=torch.channels_last) * 2],
    "whole": lambda a, b: [a.to(torch.float64), a > 0, a.sort(0).indices, a.sum(), a.std(0)],
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_in_memory(tmp_path: Path, name: str, mapped: bool) -> None:
    wanted = OPERATIONS[name](A.clone(), B.clone())
    with open(tmp_path / "tensors", "wb") as file:
        tensors.save(file.write, {"a": A, "b": B, "c": torch.arange(3)})
    before = (tmp_path / "tensors").read_bytes()
    with OnDisk(tmp_path) as disk:
        if mapped:
            held = disk.mapped(tmp_path / "tensors", tensors.places(tmp_path / "tensors"))
            assert torch.equal(held["c"], torch.arange(3))
            a, b = held["a"], held["b"]
        else:
            a, b = A.clone(), B.clone()
        found = OPERATIONS[name](a, b)
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    assert (tmp_path / "tensors").read_bytes() == before and os.listdir(tmp_path) == ["tensors"]


def test_memory_goes_when_tensors_go(tmp_path: Path) -> None:
    with OnDisk(tmp_path) as disk:
        kept = [A + i for i in range(50)]
        assert sum(one.kind == "scratch" for one in disk._regions.values()) >= 40
        assert sum(one.size for one in disk._resident.values()) <= 16384
        last = kept[-1]
        del kept
        assert len(disk._regions) == 1 and torch.equal(last, A + 49)


def test_a_network_is_built_without_its_first_values(tmp_path: Path) -> None:
    with OnDisk(tmp_path) as disk, disk.building():
        net = nn.Sequential(nn.Linear(30, 40), nn.Embedding(50, 60))
        twin = copy.deepcopy(net)
        mask = torch.empty(40, 40).fill_(float("-inf")).triu_(1)
    weights = [net[0].weight, net[1].weight, twin[0].weight]
    assert not any(w.any() for w in weights)
    assert {one.kind for one in disk._regions.values()} == {"zeros", "memory"}
    assert torch.equal(mask, torch.full((40, 40), float("-inf")).triu_(1))


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**words: object) -> None:
        raise OSError(28, "No space left on device")

    ax.save(build(), tmp_path / "in")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ax.GrowthError, match="new tensors lie meanwhile, cannot be written: No space left on device"):
        grow_checkpoint(tmp_path / "in", tmp_path / "out", build, [ax.Duplicate("blocks")])
    assert os.listdir(tmp_path) == ["in"]


def test_values_are_written_from_where_they_lie(tmp_path: Path) -> None:
    with open(tmp_path / "tensors", "wb") as file:
        tensors.save(file.write, {"a": A, "b": B})
    with OnDisk(tmp_path) as disk:
        held = disk.mapped(tmp_path / "tensors", tensors.places(tmp_path / "tensors"))
        for tensor in (held["a"], held["b"].clone(), torch.empty(50, 60).zero_()):
            found = disk.blocks(tensor)
            assert found is not None and b"".join(map(bytes, found)) == b"".join(tensors.blocks_of(tensor))
        assert all(disk.blocks(tensor) is None for tensor in (A, held["a"].t(), held["a"][1:], held["a"] + 1))
        assert disk.blocks(held["b"].add_(1)) is None
        os.truncate(tmp_path / "tensors", 2000)
        with pytest.raises(ax.GrowthError, match="has become shorter while it was read. Nothing was left behind"):
            list(disk.blocks(held["a"]) or ())

"""Tensors come back from a checkpoint in the memory order that they had, as ``torch.load`` brings them back."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from turned import Run, built

import anew
import auxin as ax
from auxin.checkpoint.directory import read, write

ORDERS: dict[str, Callable[[], Tensor]] = {
    "by rows": lambda: torch.arange(6.0).reshape(2, 3),
    "by columns": lambda: torch.arange(6.0).reshape(3, 2).t(),
    "channels last": lambda: torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "channels last, of one pixel": lambda: torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last),
    "axes in any order": lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "by columns, stored as bytes": lambda: torch.randn(3, 2, dtype=torch.complex128).t(),
    "eigenvectors": lambda: torch.linalg.eigh(torch.eye(3) + 0.1)[1],
    "empty": lambda: torch.empty(0, 3).t(),
}


@pytest.mark.parametrize("name", ORDERS)
def test_as_torch_load_brings_it_back(name: str, tmp_path: Path) -> None:
    tensor, buffer = ORDERS[name](), io.BytesIO()
    torch.save(tensor, buffer)
    theirs = torch.load(io.BytesIO(buffer.getvalue()))
    write(tmp_path, {"a.safetensors": {"one": tensor, "tied": tensor}})
    ours = read(tmp_path).tensors("a.safetensors")
    assert ours["one"] is ours["tied"] or not tensor.numel()
    assert torch.equal(ours["one"], theirs) and ours["one"].stride() == theirs.stride()


def test_what_has_gaps_comes_back_by_rows(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 6).t()[::2]
    write(tmp_path, {"a.safetensors": {"one": tensor}})
    found = read(tmp_path).tensors("a.safetensors")["one"]
    assert torch.equal(found, tensor) and found.is_contiguous()


def test_a_run_goes_on_in_a_new_process_to_the_bit_and_in_its_memory_order(tmp_path: Path) -> None:
    run = Run()
    run.steps(0, 3)
    run.grower.grow(ax.Duplicate("1", by=1))
    run.steps(3, 6)
    ax.save(run.grower, tmp_path / "run")
    run.steps(6, 9)
    code = "import sys, turned; turned.go_on(*sys.argv[1:])"
    done = anew.run("-c", code, tmp_path / "run", tmp_path / "seen.pt", cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    ours, theirs = run.seen(), torch.load(tmp_path / "seen.pt")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.stride() == theirs[name].stride(), name
    orders = {name.rpartition(".")[2] for name, tensor in ours.items() if not tensor.is_contiguous()}
    assert {"weight", "mask", "weight basis", "weight momentum"} <= orders


def test_a_network_without_values_takes_the_order_of_the_checkpoint(tmp_path: Path) -> None:
    run = Run()
    ax.save(run.grower, tmp_path)
    with torch.device("meta"):
        model = built()
    ax.load(tmp_path, model)
    for name, tensor in run.model.state_dict().items():
        assert model.state_dict()[name].stride() == tensor.stride(), name

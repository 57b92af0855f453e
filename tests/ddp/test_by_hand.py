"""What plain PyTorch lets go wrong under DDP without a word, as docs/ddp.md says; and the scripts of the pages."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import on_ranks
from ranked import Block, share, train_step, values, wrapped
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import anew

PAGES = Path(__file__).parents[2] / "docs"


def spread(module: Any) -> float:
    """The largest difference of any parameter between two ranks."""
    ours = values(*module.parameters())
    theirs = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, ours)
    return float((theirs[0] - theirs[1]).abs().max())


def by_hand(rank: int) -> dict[str, float]:
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = {}

    def train(model: Any) -> None:
        for step in range(4):
            train_step(model, optimizer, *share(step, rank, 2))

    train(model)
    found["before"] = spread(model)
    torch.manual_seed(7)
    block = Block(8)
    model.module.blocks.append(block)
    optimizer.add_param_group({"params": list(block.parameters())})
    found["inserted"] = spread(block)
    train(model)
    found["trained"] = spread(block)
    again = DistributedDataParallel(model.module)
    found["wrapped again"] = spread(block)
    train(again)
    found["trained again"] = spread(block)
    return found


def test_a_block_that_was_put_in_by_hand_drifts_and_drifts_again() -> None:
    for found in on_ranks(2, by_hand):
        assert found["before"] == found["inserted"] == found["wrapped again"] == 0
        assert found["trained"] > 1e-3 and found["trained again"] > 1e-3


def own_numbers_and_thawed(rank: int) -> list[float]:
    model = wrapped(rank)
    model.module.out.requires_grad_(False)
    model = DistributedDataParallel(model.module)
    model.module.out.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        train_step(model, optimizer, *share(step, rank, 2))
    torch.manual_seed(rank)
    return [spread(model.module.out), spread(Block(8)), spread(model.module.inp)]


def test_own_random_numbers_and_a_thawed_layer_differ() -> None:
    for thawed, own, _ in on_ranks(2, own_numbers_and_thawed):
        assert thawed > 1e-3 and own > 1e-3


def frozen_late(rank: int) -> tuple[float, str]:
    model = wrapped(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step(model, optimizer, *share(0, rank, 2))
    model.module.inp.requires_grad_(False)
    train_step(model, optimizer, *share(1, rank, 2))
    found = spread(model)
    with pytest.raises(RuntimeError) as error:
        train_step(model, optimizer, *share(2, rank, 2))
    return found, str(error.value)


def test_a_layer_that_was_frozen_late_stops_the_averaging() -> None:
    for found, error in on_ranks(2, frozen_late):
        assert found > 1e-3 and "Expected to have finished reduction" in error


def built_again(rank: int) -> tuple[list[int], bool, int]:
    model = wrapped(rank)
    fired: list[int] = []
    model.register_forward_hook(lambda *_: fired.append(1))
    model.register_comm_hook(None, allreduce_hook)
    model.eval()
    model.__init__(model.module)
    model(share(0, rank, 2)[0])
    return fired, model.training, len(model._comm_hooks)


def test_the_constructor_called_again_forgets_hooks_and_modes() -> None:
    assert on_ranks(2, built_again) == [([], True, 0)] * 2


def script_of(page: str, folder: Path) -> Path:
    script, text = folder / f"grow_{page}.py", (PAGES / f"{page}.md").read_text()
    script.write_text(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0])
    return script


def assert_has_grown(printed: str, saved: Path, processes: int) -> None:
    assert printed.count(" <- copy of blocks.") == 2
    assert f"3 blocks on {processes} ranks" in printed
    assert len(list(saved.iterdir())) == 1


@pytest.mark.parametrize("page", ["ddp", "fsdp"])
def test_the_script_of_the_page_runs(page: str, tmp_path: Path) -> None:
    """With what torchrun tells each process."""
    script = script_of(page, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    files = [[str(tmp_path / f"{name}{rank}") for name in ("out", "err")] for rank in range(2)]
    ranks = [
        anew.start(script, files=files[rank], cwd=tmp_path, env={**told, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        process.join(100)
        assert process.exitcode == 0, Path(files[rank][1]).read_text()[-3000:]
    assert_has_grown("".join(Path(out).read_text() for out, _ in files), tmp_path / "run" / page, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_the_script_of_the_page_runs_under_torchrun(tmp_path: Path, processes: int) -> None:
    script = script_of("ddp", tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_has_grown(done.stdout, tmp_path / "run" / "ddp", processes)

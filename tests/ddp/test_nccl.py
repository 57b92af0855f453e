"""One rank over NCCL, where a GPU is there."""

import pytest
import torch
import torch.distributed as dist
from ranked import Net, batch, train_step
from torch.nn.parallel import DistributedDataParallel

import auxin as ax


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_growth_over_nccl_on_one_gpu() -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        weights = []
        for wrap in (True, False):
            torch.manual_seed(0)
            model = Net().cuda()
            whole = DistributedDataParallel(model, device_ids=[0]) if wrap else model
            optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2, fused=True)
            edits = ax.Duplicate("blocks", by=1)
            grower = ax.Grower(whole, optimizer, edits=edits, when=ax.when.every(5), probe=batch(0)[0].cuda())
            for step in range(20):
                x, y = (t.cuda() for t in batch(step))
                train_step(whole, optimizer, x, y)
                grower.step()
            ax.verify(whole, optimizer)
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            del whole
        assert float((weights[0] - weights[1]).abs().max()) <= 1e-6
    finally:
        dist.destroy_process_group()

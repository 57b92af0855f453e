"""What a snapshot of a 98 M GPT with Adam state costs beside a plain copy; and the memory of a growth."""

import argparse
import gc
import statistics
import time

import torch
from gpt import GPT, train

import auxin as ax
from auxin.trial import Snapshot


def live_bytes() -> int:
    gc.collect()
    seen = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--depth", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = GPT(args.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (1, 32))
    train(model, optimizer, ids, 1)
    optimizer.zero_grad()
    before = live_bytes()
    change = ax.grow(model, ax.Duplicate("blocks", by=1), optimizer, probe=ids)
    born = sum(p.numel() * p.element_size() for p in change.parameters)
    print(f"live tensor bytes beyond the new tensors after a growth: {live_bytes() - before - born:,}")
    del change
    train(model, optimizer, ids, 1)
    optimizer.zero_grad()
    snapshot = Snapshot([model, optimizer])
    snapshot.take()
    tensors = [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]
    targets = [torch.empty_like(t) for t in tensors]
    source = torch.empty(snapshot.nbytes // 4)
    target = torch.empty_like(source)
    rows: dict[str, list[float]] = {"the same tensors": [], "one tensor of the same size": []}
    for _ in range(args.rounds + 1):
        each = seconds(lambda: [b.copy_(a) for a, b in zip(tensors, targets, strict=True)])
        whole = seconds(lambda: target.copy_(source))
        taken = seconds(snapshot.take)
        rows["the same tensors"].append(taken / each)
        rows["one tensor of the same size"].append(taken / whole)
    print(f"snapshot of {snapshot.nbytes / 1e9:.2f} GB, refresh of its buffers")
    for name, values in rows.items():
        print(f"  / a plain copy of {name}: median {statistics.median(values[1:]):.2f}")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

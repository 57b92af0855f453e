"""Run a function on several ranks: forked processes with a process group on loopback, bounded in time."""

import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch.distributed as dist

CONTEXT = get_context("fork")


class RankFailed(AssertionError):
    """A rank raised, or did not end in time."""


def on_ranks(
    size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, patience: float = 30.0
) -> list:
    """What `function(rank, *args)` returns on each of `size` ranks (picklable values).

    `timeout`: seconds after which the ranks are killed and the test fails; `patience`: of the process group.
    """
    ports = CONTEXT.Queue()
    ends, children = [], []
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        child = CONTEXT.Process(target=_run, args=(rank, size, ports, theirs, patience, function, args), daemon=True)
        child.start()
        theirs.close()
        ends.append(ours)
        children.append(child)
    try:
        return _results(ends, time.monotonic() + timeout)
    finally:
        for child in children:
            if child.is_alive():
                child.join(5)
            if child.is_alive():
                child.kill()
            child.join()


def _results(ends: list[Any], deadline: float) -> list:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in results]
        ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(ends)) if rank not in results]
            raise RankFailed(f"ranks {missing} hang; the others gave {results}")
        for end in ready:
            rank = ends.index(end)
            try:
                results[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                results[rank] = (False, "ended without a word")
    failed = {rank: text for rank, (fine, text) in results.items() if not fine}
    if failed:
        raise RankFailed("\n".join(f"rank {rank}: {text}" for rank, text in failed.items()))
    return [results[rank][1] for rank in range(len(ends))]


def _run(rank: int, size: int, ports: Any, end: Any, patience: float, function: Any, args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        wait = timedelta(seconds=patience)
        if rank == 0:  # port 0: the system picks a free one, and nobody can take it in between
            store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=wait, wait_for_workers=False)
            for _ in range(size - 1):
                ports.put(store.port)
        else:
            store = dist.TCPStore("127.0.0.1", ports.get(timeout=patience), size, timeout=wait, wait_for_workers=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
        result = (True, function(rank, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    end.send_bytes(pickle.dumps(result))  # by value: torch's own way keeps tensors in a process that ends
    end.close()
    if result[0] and dist.is_initialized():
        dist.barrier()  # rank 0 holds the store: it stays until all are through
    os._exit(0)

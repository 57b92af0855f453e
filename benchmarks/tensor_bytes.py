"""Bytes of tensors, by storage."""

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from auxin.sharded import here


class Bytes(TorchDispatchMode):
    """The most bytes that lived at once in storages that some operation has touched, or that were there before.

    Args:
        there: tensors that are there before; those that nothing touches would not be seen.
    """

    def __init__(self, there: Any = ()) -> None:
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.most = 0
        self._know(there)

    def _know(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = here(tensor.detach()).untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._know((args, kwargs, result))
        self.most = max(self.most, sum(map(alive, self.known.values())))
        return result


def alive(ref: StorageWeakRef) -> int:
    storage = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else storage.nbytes()


def peak(call: Callable[[], Any], optimizer: torch.optim.Optimizer) -> int:
    """The most bytes that lived at once during a call, those of the parameters and moments included."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with Bytes((parameters, [[*optimizer.state[p].values()] for p in parameters])) as counted:
        call()
    return counted.most

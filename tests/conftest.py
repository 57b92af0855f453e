"""One thread and one seed for every test: no figure depends on the machine's cores or on the order of the tests."""

import copy
import gc
import os
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test cuts the power, and waiting for the disk is a tenth of the suite
# Where there is no such device, each seed waits for one, with a stack trace: a hundred times what seeding takes.
for kind in ("cuda", "xpu", "mtia"):
    if not getattr(torch, kind).is_available():
        getattr(torch, kind).manual_seed_all = lambda seed: None
torch.manual_seed(0)  # for the modules that test files build while they are collected


def copied(old: OrderedDict[Any, Any], memo: dict[int, Any]) -> OrderedDict[Any, Any]:
    """What ``copy.deepcopy`` makes of one, without the detour over pickling: a module holds a dozen of them."""
    new: OrderedDict[Any, Any] = OrderedDict()
    memo[id(old)] = new
    for key, value in old.items():
        new[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
    if old.__dict__:
        new.__dict__.update(copy.deepcopy(old.__dict__, memo))
    return new


copy._deepcopy_dispatch[OrderedDict] = copied  # copies of networks in tests and libraries: a twentieth of the suite


def pytest_collection_finish() -> None:
    """Keep the collector from the libraries: each full collection, and the Trainer asks for many, took a second.

    It looks at what is new each 20,000 objects instead of each 700: that was a tenth of the suite.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)

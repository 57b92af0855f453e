"""One thread and one seed for every test: no figure depends on the machine's cores or on the order of the tests."""

import gc
import os
import random

import pytest
import torch

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # no test cuts the power, and waiting for the disk is a tenth of the suite
torch.manual_seed(0)  # for the modules that test files build while they are collected


def pytest_collection_finish() -> None:
    """Keep the collector from the libraries: each full collection, and the Trainer asks for many, took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)

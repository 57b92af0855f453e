"""A task of its own, small and random."""

import pytest
import torch

from auxin.demo.series import Task


def _example(validation: float = 0.0, test: float = 0.0) -> Task:
    """60 series of 40 values and 4 to come, with something added to the months to validate or to test on."""
    values = torch.rand(60, 44, generator=torch.Generator().manual_seed(0)) + 1
    values[:, 36:40] += validation
    values[:, 40:] += test
    return Task("example", list(values[:, :40]), values[:, 40:], [str(i) for i in range(60)], season=3)


@pytest.fixture(scope="session")
def example():
    """Builds the task."""
    return _example


@pytest.fixture(scope="session")
def example_task() -> Task:
    """The task with nothing added."""
    return _example()

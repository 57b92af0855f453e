import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled before, and the limits are torch's own again afterwards."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    config = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch.manual_seed(0)
    yield
    config.recompile_limit, config.accumulated_recompile_limit = limits
    torch.compiler.reset()


@pytest.fixture
def warned():
    """What torch.compile has logged as a warning."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)

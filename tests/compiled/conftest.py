import logging

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled before, and the settings are torch's own again afterwards."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch.manual_seed(0)
    settings = ("recompile_limit", "accumulated_recompile_limit", "skip_nnmodule_hook_guards")
    before = {name: getattr(torch._dynamo.config, name) for name in settings}
    yield
    for name, value in before.items():
        setattr(torch._dynamo.config, name, value)
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

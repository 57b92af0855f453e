import logging

import pytest
import torch

DEFAULTS = {"recompile_limit": 8, "accumulated_recompile_limit": 256, "skip_nnmodule_hook_guards": True}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Nothing is compiled before, and the settings are torch's own, whatever ran earlier in this process."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    torch.manual_seed(0)
    before = {name: getattr(torch._dynamo.config, name) for name in DEFAULTS}
    for name, value in DEFAULTS.items():
        setattr(torch._dynamo.config, name, value)
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

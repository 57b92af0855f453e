"""The global random generators: torch on every device in use, Python's, and NumPy's where it is loaded."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def random_state(seed: int | None = None) -> Iterator[None]:
    """Leave every global random generator bit for bit where it was; inside, start from ``seed``."""
    before = random_data(plain=False)
    try:
        try:
            if seed is not None:
                # A CUDA that is not in use would note the seed, with a stack trace, and take it later on.
                seeding = torch.default_generator if _cuda_waits() else torch
                seeding.manual_seed(seed % 2**63)
                random.seed(seed)
                numpy = sys.modules.get("numpy")
                if numpy is not None:
                    numpy.random.seed(seed % 2**32)
            yield
        finally:
            restore_random(before)
    except BaseException:  # an interrupt may have cut that short
        restore_random(before)
        raise


def _cuda_waits() -> bool:
    return not torch.cuda.is_initialized() and not (torch.mps.is_available() or torch.xpu.is_available())


def random_data(plain: bool = True) -> dict[str, Any]:
    """The generators' states as plain data and small tensors; otherwise NumPy's as its own array."""
    data: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        data["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        keys = keys.tolist() if plain else keys
        data["numpy"] = (str(name), keys, *(float(v) if isinstance(v, float) else int(v) for v in rest))
    return data


def restore_random(data: Mapping[str, Any]) -> None:
    """Put every generator back that is there in this process."""
    torch.set_rng_state(data["torch"])
    random.setstate(data["python"])
    if "cuda" in data and torch.cuda.is_available() and len(data["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(data["cuda"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in data:
        name, keys, *rest = data["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype="uint32"), *rest))


def is_generator(value: Any) -> bool:
    """Whether this is a random generator that somebody holds: of torch, of Python, or of NumPy."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def generator_state(generator: Any) -> Any:
    """What ``set_generator_state`` needs to put it back."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def set_generator_state(generator: Any, state: Any) -> None:
    """Put one generator back."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)

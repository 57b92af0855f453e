"""`import auxin` loads torch and the standard library, nothing heavy."""

import subprocess
import sys

import pytest

NEVER = [
    "auxin.hosts",
    "transformers",
    "peft",
    "accelerate",
    "lightning",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "rich",
]
ONLY_WITH_TORCH = ["numpy", "safetensors", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp"]


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after `code`."""
    program = f"{code}\nimport sys\nprint(chr(10).join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def with_auxin() -> set[str]:
    return loaded_after("import auxin")


@pytest.fixture(scope="module")
def with_torch() -> set[str]:
    return loaded_after("import torch")


@pytest.mark.parametrize("name", NEVER)
def test_never_loaded(with_auxin: set[str], name: str) -> None:
    assert name not in with_auxin


@pytest.mark.parametrize("name", ONLY_WITH_TORCH)
def test_loaded_only_if_torch_loads_it(with_auxin: set[str], with_torch: set[str], name: str) -> None:
    assert name not in with_auxin - with_torch


def test_the_only_new_packages_are_ours(with_auxin: set[str], with_torch: set[str]) -> None:
    new = {name.split(".")[0] for name in with_auxin - with_torch} - set(sys.stdlib_module_names)
    assert new <= {"auxin", "torch"}

"""Real architectures of Hugging Face transformers and timm with random weights, small, and an input for each."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from architectures import INPUTS, NAMES, OPTIONAL, PARTICULAR, SIDE, SIZES, UNCACHED
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def kind_of(name: str) -> str:
    """The kind of an architecture: "causal", "encoder", ..., "timm"."""
    return next(kind for kind, names in NAMES.items() if name in names)


def build(name: str, seed: int = 0) -> Built:
    """A model in eval mode on the CPU, and the positional and keyword arguments of a call.

    Every parameter has noise on top of its usual start and every batch norm has statistics that are off, so that
    neither zeros nor ones hide a mistake.
    """
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if kind_of(name) == "timm":
            model = timm().create_model(name, num_classes=10, **PARTICULAR.get(name, {})).eval()
            side = SIDE.get(name, 64)
            args, kwargs = (torch.randn(2, 3, side, side, generator=generator),), {}
        else:
            model = _of_transformers(name).eval()
            args, kwargs = (), _inputs(name, model, generator)
        for tensor in _noised(model):
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        _settle(model, args, kwargs, generator)
    return model, args, kwargs


def has_timm() -> bool:
    """Whether timm and the torchvision that it imports are installed."""
    try:
        timm()
    except ImportError:
        return False
    return True


@functools.cache
def timm() -> Any:
    """The module; ``ImportError`` where it is not installed."""
    import_torchvision()
    return importlib.import_module("timm")


@functools.cache
def import_torchvision() -> None:
    """Import torchvision, where it is installed, beside a CPU build of torch: compiled operators may be missing.

    Then registrations that are about them fail, and with them whatever looks for torchvision later; they are skipped.
    """
    register: Any = torch.library.register_fake

    def lenient(operator: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return register(operator, *args, **kwargs)

    torch.library.register_fake = lenient
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    finally:
        torch.library.register_fake = register


def _of_transformers(name: str) -> Any:
    import_torchvision()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.CONFIG_MAPPING[name]
    defaults = kind().to_dict()
    small = {field: SIZES[field] for field, value in defaults.items() if field in SIZES and _counts(field, value)}
    config = kind(**small | PARTICULAR.get(name, {}))
    auto = transformers.AutoModelForCausalLM if kind_of(name) == "causal" else transformers.AutoModel
    return auto.from_config(config, attn_implementation="eager")


def _counts(field: str, value: Any) -> bool:
    return type(value) is int or (value is None and field in OPTIONAL)


def _inputs(name: str, model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Keyword arguments of a call, each a seeded tensor."""
    side = getattr(model.config, "image_size", None) or 32
    side = max(32, side if isinstance(side, int) else side[0])
    usual = {"pixel_values": (2, 3, side, side), "input_values": (2, 2000)}
    wanted = INPUTS.get(name)
    if wanted is None:
        wanted = {model.main_input_name: usual.get(model.main_input_name, ("ids", (2, 16)))}
        if model.config.is_encoder_decoder:
            wanted = wanted | {"decoder_input_ids": ("ids", (2, 8))}
    kwargs: dict[str, Any] = {key: _tensor(spec, generator) for key, spec in wanted.items()}
    return kwargs | ({"use_cache": False} if name in UNCACHED else {})


def _tensor(spec: Any, generator: torch.Generator) -> Tensor:
    if not isinstance(spec[0], str):
        return torch.randn(spec, generator=generator)
    kind, shape = spec
    if kind == "ids":
        return torch.randint(3, 90, shape, generator=generator)
    return torch.ones(shape, dtype=torch.long) if kind == "ones" else torch.arange(shape[1]).expand(shape)


def _noised(model: nn.Module) -> list[Tensor]:
    """What gets noise: the weights, and the buffers that correct the routing of experts."""
    routing = [buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
    return [tensor for tensor in (*model.parameters(), *routing) if tensor.is_floating_point()]


def _settle(model: nn.Module, args: Any, kwargs: Any, generator: torch.Generator) -> None:
    """Give batch norms the statistics of what arrives at them, some way off: at 0 and 1 deep signals die or explode."""
    handles = []
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:

            def settle(norm: Any, given: Any) -> None:
                x = given[0].transpose(0, 1).flatten(1)
                var, mean = torch.var_mean(x, dim=1, correction=0)
                var = var.clamp_min(0.1 * float(var.mean()))
                norm.running_mean.copy_(mean + 0.1 * var.sqrt() * torch.randn(mean.shape, generator=generator))
                norm.running_var.copy_(var * (1 + 0.3 * torch.rand(var.shape, generator=generator)))

            handles.append(module.register_forward_pre_hook(settle))
    if handles:
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()

"""What transformers says about a checkpoint: whether a deeper one opens as it should, and which tensors write.

The models here are on the meta device, but for a single block. transformers is imported on demand.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from auxin.anatomy.blocks import CONTAINERS, Container
from auxin.anatomy.depth import numbers
from auxin.anatomy.hugging_face.fields import BlockList
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.zero_init import is_identity, last_writers, set_constants
from auxin.edits.start import gets_gradient, warn_of_norms
from auxin.errors import GrowthError
from auxin.listing import module_at
from auxin.randomness import random_state
from auxin.upscale.directory import Checkpoint
from auxin.upscale.files import Stored

SMALL = 64  # words that the vocabulary of a one-block model keeps
PLAIN = (int, float, str, bool)
OWN = ("training", "gradient_checkpointing")  # how a module is run, not what it is


def model_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that opens a checkpoint.

    Raises:
        GrowthError: transformers is not installed, or does not know it (code beside a checkpoint is never run).
    """
    try:
        import transformers
    except ImportError as error:
        raise GrowthError(f"transformers is not installed ({error}): pip install transformers.") from error
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    found = getattr(transformers, name, None) if name else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained") or not hasattr(found, "config_class"):
        raise GrowthError(
            f"transformers {transformers.__version__} has no model {name!r}, which config.json names as architectures "
            "(code beside a checkpoint is never run)."
        )
    return found


def full_config(cls: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with everything that config.json leaves to its class.

    Raises:
        GrowthError: the class does not take it.
    """
    return _config(cls, raw).to_dict()


def differences(
    cls: Any, raw: Mapping[str, Any], new: Mapping[str, Any], blocks: BlockList, sources: Sequence[int]
) -> tuple[list[str], list[str]]:
    """What a model built from the new configuration has otherwise than the blocks that it is to hold.

    Args:
        cls: of the model.
        raw: the configuration of the checkpoint.
        new: the configuration of the deeper one.
        blocks: the list.
        sources: the old block of every position.

    Returns:
        Tensors that would not fit, and settings that would be others; both empty where all is well.

    Raises:
        GrowthError: a model cannot be built at all, or ties tensors of the blocks to others.
    """
    old, deeper = on_meta(cls, raw), on_meta(cls, new)
    before, after = container_of(old, blocks), container_of(deeper, blocks, len(sources))
    ties = getattr(old, "all_tied_weights_keys", None) or {}
    tied = [name for pair in ties.items() for name in pair if str(name).startswith(f"{before.path}.")]
    if tied:
        raise GrowthError(
            f"{tied[0]} is tied to a tensor elsewhere in the model: a copy of its block would have weights of its own."
        )
    known = {number.name for number in numbers(before)}
    tensors, settings = _around(old, deeper, before.path, after.path), []
    for position, source in enumerate(sources):
        here, there = before.child(source), after.child(position)
        where = f"{blocks.path}.{position} (from {source})"
        tensors += [f"{where}: {text}" for text in _other_shapes(here, there)]
        settings += [f"{where}: {text}" for text in _other_settings(here, there, known)]
    return tensors, settings


def writers(
    cls: Any, checkpoint: Checkpoint, configs: Sequence[Mapping[str, Any]], blocks: BlockList, source: int
) -> dict[str, float]:
    """The tensors of one block that must be constant in a copy that returns its input, solved on the block itself.

    Args:
        cls: of the model.
        checkpoint: from which the block is read.
        configs: that say this block alone, behind the first block, behind the first two, and so on: where the first
            ones are special, a block of another kind cannot stand first. The first configuration that fits is taken.
        blocks: the list.
        source: which block.

    Returns:
        Constant by name inside the block, as the files name it: 0, or -1 for a gain that is stored as 1 + w.

    Raises:
        GrowthError: no zeroing makes the block return its input, or the files hold it in another form.
    """
    where = f"output='zero': {blocks.path}.{source}"
    if any("quantization" in name for name in configs[0]):
        raise GrowthError(f"{where}: its weights are quantized. Use output='keep', or a checkpoint that is not.")
    names = [name for name, _ in stored_in(checkpoint, blocks, source)]
    config, standing, origins = origins_of(cls, checkpoint, configs, blocks, source)
    state = {
        f"{blocks.path}.{position}.{name}": t.load()
        for position, block in enumerate(standing)
        for name, t in stored_in(checkpoint, blocks, block)
    }
    with random_state(seed=0):
        constants = _solved(cls, config, blocks, state, len(standing), where)
    shared = {mark for name, found in origins.items() if name not in constants for mark in found}
    found: dict[str, float] = {}
    for name, value in constants.items():
        for mark in origins[name]:
            if mark in shared or mark not in range(1, len(names) + 1):
                raise GrowthError(
                    f"{where}: {name} must be zero, and the files hold it in one tensor with others "
                    f"({names[int(mark) - 1] if mark in shared else 'computed from several'}). Use output='keep'."
                )
            found[names[int(mark) - 1]] = value
    return found


def origins_of(
    cls: Any, checkpoint: Checkpoint, configs: Sequence[Mapping[str, Any]], blocks: BlockList, source: int
) -> tuple[Mapping[str, Any], list[int], dict[str, list[float]]]:
    """The configuration that fits, the blocks in it, and which of the files' tensors each of the model's is made of.

    Found by loading numbers in their place: tensor i of the files is full of the number i, at the cost of one number.
    """
    refused: GrowthError | None = None
    for lead, config in enumerate(configs):
        standing = [*range(lead), source]
        marks = {
            f"{blocks.path}.{position}.{name}": torch.tensor(float(i if block == source else 0)).expand(t.shape)
            for position, block in enumerate(standing)
            for i, (name, t) in enumerate(stored_in(checkpoint, blocks, block), 1)
        }
        try:
            marked = few_blocks(cls, config, blocks, marks, torch.float32, len(standing))
        except GrowthError as error:
            refused = refused or error
            continue
        block = container_of(marked, blocks, len(standing)).child(lead)
        return config, standing, {name: _values(p.detach()) for name, p in block.named_parameters()}
    raise refused or GrowthError(f"{blocks.path}.{source}: there is no configuration for it.")


def stored_in(checkpoint: Checkpoint, blocks: BlockList, source: int) -> list[tuple[str, Stored]]:
    """The tensors of a block, by name inside it."""
    prefix = f"{blocks.path}.{source}."
    return [(n.removeprefix(prefix), t) for n, t in checkpoint.tensors.items() if n.startswith(prefix)]


def _values(tensor: Tensor) -> list[float]:
    """The different numbers in it; one that was expanded from a single number is looked at once."""
    return (tensor.flatten()[:1] if tensor.numel() and not any(tensor.stride()) else tensor.unique()).tolist()


def _solved(
    cls: Any, config: Mapping[str, Any], blocks: BlockList, state: dict[str, Tensor], depth: int, where: str
) -> dict[str, float]:
    """The constants by name in the model's own block."""
    block, call = _called(cls, config, blocks, state, depth, where)
    state.clear()
    constants = last_writers(block, call)
    if constants:
        with warnings.catch_warnings(record=True) as caught:
            warn_of_norms(block, call, constants, where)
        set_constants(block, constants)
        if is_identity(block, call) and gets_gradient(block, call, constants):
            for warning in caught:
                warnings.warn(str(warning.message), stacklevel=5)
            return constants
    raise GrowthError(
        f"{where}: no tensors of a {type(block).__name__} can be zeroed so that a copy returns its input and still "
        "learns (a norm after the residual sum, or a block without a residual). output='keep' copies it as it is; or "
        "open the model and fade a copy in: auxin.grow(model, auxin.Duplicate(...), stock=False)."
    )


def _called(
    cls: Any, config: Mapping[str, Any], blocks: BlockList, state: dict[str, Tensor], depth: int, where: str
) -> tuple[nn.Module, Call]:
    """One real block, the last in a small model, and what arrives at it."""
    model = few_blocks(cls, config, blocks, state, "auto", depth)
    block = container_of(model, blocks, depth).child(depth - 1)
    try:
        calls, _ = PlanContext(model, probe_of(model, where)).calls({"block": block})
    except GrowthError:
        raise
    except Exception as error:  # whatever a forward raises
        raise GrowthError(f"{where}: one block alone does not run ({error}). Use output='keep'.") from error
    if "block" not in calls:
        raise GrowthError(f"{where}: the model never calls it. Use output='keep'.")
    block.eval()
    return block.requires_grad_(True), calls["block"]


def few_blocks(
    cls: Any, config: Mapping[str, Any], blocks: BlockList, named: Mapping[str, Tensor], dtype: Any, depth: int
) -> nn.Module:
    """A model of ``depth`` blocks with a small vocabulary, the blocks holding the tensors ``named`` as in files."""
    small = _config(cls, _small(config))
    with _quiet():
        try:
            model, told = cls.from_pretrained(
                None,
                config=small,
                state_dict=dict(named),
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
            )
        except Exception as error:  # whatever a configuration of one block brings about
            raise GrowthError(
                f"{blocks.path}: {cls.__name__} cannot be built with {depth} of them ({error}). Use output='keep'."
            ) from error
    inside = f"{container_of(model, blocks, depth).path}."
    lacking = [name for name in told["missing_keys"] if name.startswith(inside)]
    odd = [*lacking, *told["unexpected_keys"], *(str(key) for key in told["mismatched_keys"])]
    if odd:
        raise GrowthError(
            f"{blocks.path}: the tensors of a block are not those that {cls.__name__} gives one ({sorted(odd)[0]}). "
            "Use output='keep'."
        )
    return model


def _small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with few words and no cache: the embeddings around the one block need not be large."""
    small = {}
    for name, value in config.items():
        if isinstance(value, dict) and "config" in name.lower():
            value = _small(value)
        elif name.startswith("vocab_size") and type(value) is int:
            value = min(value, SMALL)
        elif name.endswith("token_id") and value is not None:
            value = 0
        small[name] = value
    return {**small, "use_cache": False}


def probe_of(model: Any, where: str) -> dict[str, Tensor]:
    """A small input of the kind that the model takes."""
    name = model.main_input_name
    if name == "input_ids":
        ids = torch.arange(1, 17).reshape(2, 8)
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    if name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return {"pixel_values": torch.randn(1, config.num_channels, side, side, dtype=dtype)}
    raise GrowthError(f"{where}: it is not known what to run a model on that takes {name}. Use output='keep'.")


def _config(cls: Any, raw: Mapping[str, Any]) -> Any:
    try:
        with _quiet():
            return cls.config_class.from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # whatever the checks of a configuration raise
        raise GrowthError(f"config.json: {cls.config_class.__name__} does not take it ({error}).") from error


def on_meta(cls: Any, raw: Mapping[str, Any]) -> nn.Module:
    """What a class builds from a configuration, without memory for it.

    Raises:
        GrowthError: it does not take it, or cannot be built.
    """
    try:
        with _quiet(), torch.device("meta"), random_state():
            return cls(_config(cls, raw))
    except GrowthError:
        raise
    except Exception as error:  # whatever a constructor raises
        raise GrowthError(f"{cls.__name__} cannot be built from the configuration ({error}).") from error


def container_of(model: nn.Module, blocks: BlockList, length: int | None = None) -> Container:
    """The list in the model that the prefix in the files is about; its path may begin otherwise there."""
    length = blocks.length if length is None else length
    words = _words(blocks.path)
    found = [
        ((path == blocks.path, len(words & _words(path)), -len(_words(path))), path)
        for path, module in model.named_modules()
        if isinstance(module, CONTAINERS) and len(module) == length
    ]
    best = max((same for same, _ in found), default=None)
    paths = [path for same, path in found if same == best]
    if len(paths) != 1:
        raise GrowthError(
            f"{blocks.path}: it cannot be told which list of {length} blocks of {type(model).__name__} this is: "
            f"{', '.join(path for _, path in found) or 'there is none'}"
        )
    return Container(paths[0], module_at(model, paths[0]), tuple(module_at(model, paths[0])._modules))


def _words(path: str) -> set[str]:
    """The words of a path; "layer" and "layers" are one."""
    return {word.removesuffix("s") for word in path.split(".")}


def _around(old: nn.Module, deeper: nn.Module, before: str, after: str) -> list[str]:
    """Tensors outside the list that differ in name or shape."""
    shapes = [
        {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(f"{path}.")}
        for model, path in ((old, before), (deeper, after))
    ]
    return _unequal(*shapes)


def _other_shapes(here: nn.Module, there: nn.Module) -> list[str]:
    return _unequal(*({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (here, there)))


def _unequal(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    differ = [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]
    return [f"{name} is {here.get(name, 'not')} here, {there.get(name, 'not')} there" for name in sorted(differ)]


def _other_settings(here: nn.Module, there: nn.Module, known: set[str]) -> Iterator[str]:
    """Plain attributes that are not the same, but for the numbers by which blocks know their position."""
    rebuilt = dict(there.named_modules())
    for path, module in here.named_modules():
        other = rebuilt.get(path)
        for name, value in module.__dict__.items() if other is not None else ():
            if name.startswith("_") or name in OWN or name in known or type(value) not in PLAIN:
                continue
            found = other.__dict__.get(name)
            if type(found) is type(value) and found != value:
                yield f"{path + '.' if path else ''}{name} would be {found!r}, the block was made with {value!r}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the reports and bars of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Is a grown model still one that plain transformers loads? Rebuilt from its own configuration and compared.

Nothing here imports transformers: a model is one of theirs if it has a configuration and can be saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from auxin.anatomy.hugging_face.blueprint import configuration, configured, on_meta
from auxin.anatomy.probe import PlanContext, tensors_in, untouched
from auxin.change import MISSING, Change
from auxin.errors import GrowthError
from auxin.fsdp2 import is_unit
from auxin.listing import join, module_at
from auxin.randomness import random_state

PLAIN = (int, float, str, bool)
OWN = ("training", "gradient_checkpointing")  # how a module is run, not what it is
WORDS, NEW_WORDS = 8, 3  # of a prompt, and behind it
ACCEPT = "Pass stock=False to grow it all the same; then keep it with auxin.save, or rebuild it and replay its journal."


def is_stock(model: nn.Module) -> bool:
    """Whether a model is what its configuration builds: the same names and shapes.

    A model with adapters or a head of one's own is none, and needs not stay one.
    """
    if not configured(model):
        return False
    try:
        return _shapes(on_meta(model, configuration(model))) == _shapes(model)
    except Exception:  # a class of the user's with arguments of its own
        return False


def generates(model: nn.Module, context: PlanContext) -> bool:
    """Whether a language model generates with a cache what it generates without; so do all that generate nothing, or
    where the probe has no token ids.
    """
    ids = _prompt(context) if getattr(model, "can_generate", bool)() else None
    if ids is None:
        return True
    try:
        with untouched(model), torch.no_grad():
            cached, plain = (_logits(model, ids, use_cache) for use_cache in (True, False))
    except Exception:  # of the model's own cache
        return False
    return cached.shape == plain.shape and torch.allclose(cached, plain, rtol=0, atol=1e-3 * float(plain.abs().max()))


def check_stock(model: nn.Module, change: Change, context: PlanContext) -> None:
    """Check that the grown model is what its edited configuration builds, and that it generates as before.

    Args:
        model: the grown model; it was stock before.
        change: what was done.
        context: holds the probe, on which both are compared.

    Raises:
        GrowthError: it is not; names what differs, the most telling first: a list of another length, other tensors,
            other attributes of blocks, the outputs.
    """
    if change.gates:
        raise GrowthError(
            f"{change.gates[0]}: the block fades in, and until its gate is folded plain transformers would refuse the "
            f"file (it holds {change.gates[0]}.auxin_gate). Pass stock=False; after {change.fade} optimizer steps the "
            "model is stock again."
        )
    tied = next((path for path, new in change.added if new.tied), None)
    if tied is not None:
        raise GrowthError(
            f"{type(model).__name__}: {tied} runs weights that another block holds. save_pretrained refuses to write "
            "such a model, and plain transformers would build one with weights of its own for each block. Pass "
            "stock=False; after Untie it is stock again."
        )
    twin = _rebuilt(model, change)
    differ = list(_differing(model, twin, change))
    counts = [words for words, counted in differ if counted]
    compared = context.has_probe and not is_unit(model)  # the rebuilt one would hold shards
    if counts or (compared and not _same_outputs(model, twin, context)):
        found = counts or [words for words, _ in differ] or ["the outputs differ, by what a configuration decides"]
        raise GrowthError(
            f"{type(model).__name__}: plain transformers would build another model from the grown configuration: "
            f"{'; '.join(found[:4])}. {ACCEPT}"
        )
    if not generates(model, context) and _generated_before(model, change, context):
        raise GrowthError(
            f"{type(model).__name__}: grown so, it does not generate with a cache what it generates without, which it "
            f"did before: the cache does not follow the new depth. {ACCEPT}"
        )


def _rebuilt(model: nn.Module, change: Change) -> nn.Module:
    """What the model's own class builds from its configuration, holding the model's tensors, on its device.

    While it is built its parameters have no memory, where the class allows that: only buffers that are in no
    state_dict are computed anew.

    Raises:
        GrowthError: it builds none into which they fit.
    """
    try:
        try:
            twin = _empty(model)
        except Exception:  # a constructor that looks at values
            with random_state(seed=0):
                twin = type(model)(configuration(model))
        misfits = list(_other_lengths(model, twin, change)) or list(_other_tensors(model, twin))
        if not misfits:
            return _filled(twin, model)
        why = "; ".join(misfits[:3]) + (f"; and {len(misfits) - 3} more" if len(misfits) > 3 else "")
        instead = _other_sources(change, misfits)
    except Exception as error:  # whatever a configuration that cannot say the new depth brings about
        raise _not_expressed(model, " ".join(str(error).split())[:300]) from error
    raise _not_expressed(model, why, instead)


def _not_expressed(model: nn.Module, why: str, instead: str = "") -> GrowthError:
    name = type(model).__name__
    return GrowthError(f"{name}: its configuration cannot express the grown model ({why}). {instead}{ACCEPT}")


def _other_sources(change: Change, misfits: list[str]) -> str:
    """What to copy instead, if only copies of some blocks do not fit, as those of a T5's first one."""
    order, paths = getattr(change.edit, "order", ()), [path for path, _ in change.added]
    at = [next((path for path in paths if text.startswith(f"{path}.")), None) for text in misfits]
    if not isinstance(order, tuple) or None in at:
        return ""
    special = {order[int(path.rpartition(".")[2])] for path in at if path is not None}
    kept = [source for i, source in enumerate(order) if source not in special or source not in order[:i]]
    others = [source for source in kept if source not in special]
    if len(kept) == len(set(kept)):  # no copy is left
        kept = sorted([*kept, *others[-1:]])
    return f"No copy of block {min(special)} fits there; order={kept} would do. " if others else ""


def _empty(model: nn.Module, config: Any = None) -> nn.Module:
    def without_memory(module: nn.Module, name: str, parameter: Any) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_memory)
    try:
        with random_state(seed=0):
            return type(model)(configuration(model) if config is None else config)
    finally:
        handle.remove()


def _filled(twin: nn.Module, model: nn.Module) -> nn.Module:
    """With the model's own tensors in it, in eval mode."""
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    first = next(model.parameters(), None)
    twin = (twin if first is None else twin.to(first.device)).eval()
    built = dict(twin.named_modules())
    for path, module in model.named_modules():
        for name, own in module._buffers.items() if path in built else ():
            computed = built[path]._buffers.get(name)  # the user's own model.to(bfloat16) has rounded ours
            if own is not None and computed is not None and own.dtype != computed.dtype:
                if own.shape == computed.shape and torch.equal(own, computed.to(own)):
                    built[path].register_buffer(name, own.detach().clone(), persistent=False)
    return twin


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in model.state_dict().items()}


def _other_lengths(model: nn.Module, twin: nn.Module, change: Change) -> Iterator[str]:
    """The changed lists that a rebuilt model has shorter, or longer."""
    rebuilt = dict(twin.named_modules(remove_duplicate=False))
    for rewire in change.rewires:
        here, there = len(module_at(model, rewire.path)._modules), rebuilt.get(rewire.path)
        if there is not None and len(there._modules) != here:
            yield f"{rewire.path} has {here} entries, rebuilt {len(there._modules)}"


def _other_tensors(model: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Tensors that a rebuilt model has otherwise, has not, or has besides."""
    ours, theirs = _shapes(model), _shapes(twin)
    for name, shape in ours.items():
        if theirs.get(name, shape) != shape:
            yield f"{name} is {tuple(shape)}, rebuilt {tuple(theirs[name])}"
    yield from (f"{name} is not there rebuilt" for name in ours if name not in theirs)
    yield from (f"{name} is there only rebuilt" for name in theirs if name not in ours)


def _same_outputs(model: nn.Module, twin: nn.Module, context: PlanContext) -> bool:
    outputs: list[list[Tensor]] = []
    for network in (model, twin):
        with untouched(network), torch.no_grad():
            outputs.append([t.clone() for t in tensors_in(context.run_of(network))])
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        return False
    pairs = zip(*outputs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs)


def _differing(model: nn.Module, twin: nn.Module, change: Change) -> Iterator[tuple[str, bool]]:
    """Plain attributes of the blocks of the changed lists that a rebuilt model has otherwise; whether each counts.

    Of what differs alike in several blocks the first is named.
    """
    named: set[tuple[str, Any, Any]] = set()
    for rewire in change.rewires:
        ours, theirs = module_at(model, rewire.path), module_at(twin, rewire.path)
        rebuilt = dict(theirs.named_modules())
        for path, module in ours.named_modules():
            other = rebuilt.get(path)
            for name, value in module.__dict__.items() if other is not None else ():
                if name.startswith("_") or name in OWN or type(value) not in PLAIN:
                    continue
                there = other.__dict__.get(name)
                if type(there) is type(value) and there != value and (name, value, there) not in named:
                    named.add((name, value, there))
                    at = join(rewire.path, join(path, name))
                    yield f"{at} is {value!r} here, {there!r} rebuilt", type(value) is int


def _generated_before(model: nn.Module, change: Change, context: PlanContext) -> bool:
    """Whether ``generates`` held before the change: asked of a rebuilt model with the old tensors."""
    config = configuration(model)
    for assign in change.assigns:
        holder, _, name = assign.name.rpartition(".")
        if assign.path == "" and holder == "config":
            vars(config).pop(name, None) if assign.old is MISSING else vars(config).update({name: assign.old})
    try:
        state: dict[str, Tensor] = dict(change.before.parameters)
        for path, module in change.before.modules.items():
            state |= {join(path, name): b for name, b in module._buffers.items() if b is not None}
        twin: Any = _empty(model, config)
        twin.load_state_dict(state, strict=False, assign=True)
        twin.tie_weights()
        return generates(twin.eval(), context)
    except Exception:  # it cannot be told
        return True


def _prompt(context: PlanContext) -> Tensor | None:
    """The first token ids of the probe."""
    args, kwargs = context.batch if context.has_probe else ((), {})
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    return ids[:1, :WORDS]


def _logits(model: Any, ids: Tensor, use_cache: bool) -> Tensor:
    """Of each new token, generated greedily."""
    flags = {"max_new_tokens": NEW_WORDS, "min_new_tokens": NEW_WORDS, "do_sample": False, "num_beams": 1}
    flags |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **flags)
    return torch.stack(made.logits)

"""What a user's own surgery did, as data: new modules described by class, plain attributes and tensor shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auxin import typed
from auxin.anatomy.probe import PlanContext
from auxin.anatomy.tree import planned, taken_over
from auxin.axes import Axes, Axis, leading
from auxin.change import MISSING, Alias, Assign, Before, Change, Continued, New, Rewire, Swap
from auxin.errors import GrowthError
from auxin.listing import join, module_at

FLAT = {"_flat_weights", "_flat_weight_refs"}  # of an RNN: derived from its parameters
INTERNAL = {"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"}


@dataclasses.dataclass(frozen=True)
class Surgery:
    """One ``surgery`` block: children, tensors and attributes of modules, by path, as plain data.

    ``steps`` is a list of mappings; ``needs`` is set instead where a part could not be written down, and says what.
    """

    steps: tuple[Any, ...] = ()
    needs: str | None = None

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Rebuild the new modules; their weights are empty and come from the checkpoint.

        Raises:
            GrowthError: the surgery could not be written down as data.
        """
        if self.needs is not None:
            raise GrowthError(
                f"this journal holds a surgery that could not be written down as data: {self.needs}. Do it again on "
                "the model first (the same code), then load into the model as it is then."
            )
        before = Before.of(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        rebuilder = _Rebuilder(before, device)
        rewires, aliases, swaps, assigns, trains = [], [], [], [], {}
        for step in self.steps:
            path = step["path"]
            if "children" in step:
                children = tuple((name, rebuilder.child(data)) for name, data in step["children"].items())
                rewires.append(Rewire(path, children))
                aliases += [Alias(a["path"], a["name"], rewires[-1]) for a in step.get("aliases", ())]
            for name, data in step.get("tensors", {}).items():
                buffer, resized = name in step.get("buffers", ()), name in step.get("resized", ())
                value = None if data is None else rebuilder.tensor(data["is"], buffer)
                axes = None if data is None else _axes(data.get("axes"))
                if data is not None and value is not None and data.get("kept"):  # as journals of 0.1 have it
                    axes = leading(_shape_of(model, path, name), value.shape)
                swaps.append(Swap(path, name, value, axes, buffer, resized))
            for name, data in step.get("attributes", {}).items():
                assigns.append(Assign(path, name, MISSING, data["value"] if "value" in data else MISSING))
            trains |= {join(path, name): flag for name, flag in step.get("trains", {}).items()}
        thawed = {id(before.parameters[name]) for name, flag in trains.items() if flag}
        change = planned(
            model, self, context.seed, rewires, swaps, touched=thawed,
            aliases=tuple(aliases), assigns=tuple(assigns), trains=trains, outputs=True,
        )  # fmt: skip
        carries = [step["carries"] for step in self.steps if "carries" in step]
        continued = {id(change.after[new]): one for held in carries for new, one in _carries(held, change)}
        return dataclasses.replace(change, moves=taken_over(change.moves, continued))


def describe(change: Change) -> Surgery:
    """Write a surgery down; where a part has no plain form, say which."""
    known: Known = {id(m): {"old": path} for path, m in change.before.modules.items()}
    old = (*change.before.parameters.items(), *change.before.buffers.items())
    resized = {id(swap.value) for swap in change.swaps if swap.resized}
    known |= {id(t): {"tied": name} for name, t in old if id(t) not in resized}
    steps: dict[str, dict[str, Any]] = {}
    try:
        for rewire in change.rewires:
            children = {n: _child(c, n, rewire.path, known) for n, c in rewire.children}
            steps.setdefault(rewire.path, {"path": rewire.path})["children"] = children
            aliases = [{"path": a.path, "name": a.name} for a in change.aliases if a.rewire is rewire]
            if aliases:
                steps[rewire.path]["aliases"] = aliases
        for swap in change.swaps:
            step = steps.setdefault(swap.path, {"path": swap.path})
            axes = None if swap.axes is None else [axis.to_json() for axis in swap.axes]
            data = None if swap.value is None else {"is": _shape(swap.value, known), "axes": axes}
            step.setdefault("tensors", {})[swap.name] = data
            for word, holds in (("buffers", swap.buffer), ("resized", swap.resized)):
                if holds:
                    step.setdefault(word, []).append(swap.name)
        for name, flag in change.trains.items():
            path, _, leaf = name.rpartition(".")
            steps.setdefault(path, {"path": path}).setdefault("trains", {})[leaf] = flag
        for assign in change.assigns:
            step = steps.setdefault(assign.path, {"path": assign.path})
            value = {} if assign.value is MISSING else {"value": _plain(assign.value, f"{assign.path}.{assign.name}")}
            step.setdefault("attributes", {})[assign.name] = value
    except GrowthError as error:
        return Surgery(needs=str(error))
    carries = {
        m.name: {"old": m.old_name, "axes": [axis.to_json() for axis in m.axes]}
        for m in change.moves
        if m.name is not None and m.old is not m.new and m.old is not None and m.axes is not None
    }
    if carries:
        steps.setdefault("", {"path": ""})["carries"] = carries
    return Surgery(tuple(steps.values()))


def _axes(data: Any) -> Axes | None:
    return None if data is None else tuple(Axis.from_json(axis) for axis in data)


def _shape_of(model: nn.Module, path: str, name: str) -> torch.Size:
    module = module_at(model, path)
    tensor = module._parameters.get(name, module._buffers.get(name))
    return torch.Size() if tensor is None else tensor.shape


def _carries(held: Any, change: Change) -> Iterator[tuple[str, Continued]]:
    """New tensors that take over the places and states of old ones; journals of 0.1 hold names only."""
    before, after = change.before, change.after
    for name in held:
        if isinstance(held, Mapping):
            yield name, Continued(held[name]["old"], _axes(held[name]["axes"]) or ())
        elif (axes := leading(before.parameters[name].shape, after[name].shape)) is not None:
            yield name, Continued(name, axes)


Known = dict[int, dict[str, Any]]  # how to name what is there already, or was written down before, by ``id``


def _child(child: str | New | None, name: str, path: str, known: Known) -> Any:
    if not isinstance(child, New):
        return None if child is None else {"kept": child}
    return _module(child.module, join(path, name), known)


def _module(module: nn.Module, where: str, known: Known) -> dict[str, Any]:
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = {"again": len(known)}
    attributes = {}
    bare = nn.Module().__dict__
    for name, value in module.__dict__.items():
        if (
            name in INTERNAL
            or (isinstance(module, nn.RNNBase) and name in FLAT)
            or (name in bare and not value and not bare[name])
        ):
            continue
        if name in bare and value == bare[name]:
            continue
        attributes[name] = _plain(value, f"{where}.{name}")
    cls = type(module)
    typed.encode(cls)
    return {
        "number": known[id(module)]["again"],
        "class": cls,
        "attributes": attributes,
        "training": module.training,
        "parameters": {n: None if p is None else _shape(p, known) for n, p in module._parameters.items()},
        "buffers": {n: None if b is None else _shape(b, known) for n, b in module._buffers.items()},
        "temporary": sorted(module._non_persistent_buffers_set),
        "children": {n: None if c is None else _module(c, f"{where}.{n}", known) for n, c in module._modules.items()},
    }


def _plain(value: Any, where: str) -> Any:
    try:
        typed.encode(value)
    except GrowthError as error:
        raise GrowthError(f"{where} ({type(value).__name__}) has no plain form: {error}") from error
    return value


def _shape(tensor: Tensor, known: Known) -> dict[str, Any]:
    if id(tensor) in known:
        return known[id(tensor)]
    known[id(tensor)] = {"again": len(known)}
    return {
        "number": known[id(tensor)]["again"],
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "trains": tensor.requires_grad,
    }


class _Rebuilder:
    """Makes modules from their description, without calling a constructor."""

    def __init__(self, before: Before, device: torch.device):
        self.before, self.device = before, device
        self.made: dict[int, Any] = {}

    def child(self, data: Mapping[str, Any] | None) -> str | New | None:
        """An old child's name, a new module, or None."""
        if data is None:
            return None
        return data["kept"] if "kept" in data else New(self.module(data))

    def module(self, data: Mapping[str, Any]) -> nn.Module:
        """One module with all below it."""
        if "old" in data:
            return self.before.modules[data["old"]]
        if "again" in data:
            return self.made[data["again"]]
        cls = data["class"]
        module = self.made[data["number"]] = cls.__new__(cls)
        nn.Module.__init__(module)
        module.__dict__.update(data["attributes"])
        module.training = data["training"]
        for name, shape in data["parameters"].items():
            module._parameters[name] = None if shape is None else self.tensor(shape)
        for name, shape in data["buffers"].items():
            module._buffers[name] = None if shape is None else self.tensor(shape, buffer=True)
        module._non_persistent_buffers_set.update(data["temporary"])
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        for name, child in data["children"].items():
            module._modules[name] = None if child is None else self.module(child)
        return module

    def tensor(self, data: Mapping[str, Any], buffer: bool = False) -> Any:
        """One tensor of the recorded shape and dtype, zeros until the checkpoint's values come."""
        if "tied" in data:
            return self.before.parameters.get(data["tied"], self.before.buffers.get(data["tied"]))
        if "again" not in data:
            value = torch.zeros(data["shape"], dtype=data["dtype"], device=self.device)
            self.made[data["number"]] = value if buffer else nn.Parameter(value, requires_grad=data["trains"])
        return self.made[data["again"] if "again" in data else data["number"]]

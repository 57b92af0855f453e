"""What a run was right before it grew: the record that the checks compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from auxin.anatomy.wrappers import networks_of
from auxin.change import Change
from auxin.testing.exact import Exact, digest, exact
from auxin.testing.run import Run

Facts = dict[str, tuple[int, str]]  # by key of an optimizer's state: identity and bits of the value


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One parameter group.

    Attributes:
        options: everything in it but the parameters.
        names: model names of its entries, None for a foreign one.
        direction: "model order", "reversed model order" or None.
    """

    group: dict[str, Any]
    entries: list[Any]
    options: Exact
    names: list[str | None]
    param_names: list[str] | None
    direction: str | None

    @classmethod
    def of(cls, group: dict[str, Any], names: Mapping[int, str]) -> Group:
        """Record a group of a network whose parameters have ``names``."""
        places = {i: place for place, i in enumerate(names)}
        listed = group.get("param_names")
        return cls(
            group,
            list(group["params"]),
            exact(_options(group)),
            [names.get(id(p)) for p in group["params"]],
            None if listed is None else list(listed),
            direction([places[id(p)] for p in group["params"] if id(p) in places]),
        )

    def problem(self, now: dict[str, Any], names: Mapping[int, str], gone: set[str]) -> str | None:
        """What is wrong with the group as it is now, in a network whose parameters have ``names``."""
        if now is not self.group:
            return "it is another dictionary"
        changed = self.options.differences(exact(_options(now)))
        if changed:
            return f"its option {changed[0]} has changed"
        old = {id(p) for p, n in zip(self.entries, self.names, strict=True) if n not in gone}
        kept = [id(p) for p in now["params"] if id(p) in old]
        if kept != [id(p) for p in self.entries if id(p) in old]:
            return "its old entries are others or have changed their order"
        places = {i: place for place, i in enumerate(names)}
        ranks = [places[id(p)] for p in now["params"] if id(p) in places]
        if self.direction == "model order" and ranks != sorted(ranks):
            return "it ran in model order and does not any more, so positional checkpoints would load wrongly"
        if self.direction == "reversed model order" and ranks != sorted(ranks, reverse=True):
            return "it ran in reversed model order and does not any more"
        return self._names_problem(now, names)

    def _names_problem(self, now: dict[str, Any], names: Mapping[int, str]) -> str | None:
        if self.param_names is None:
            return None
        listed = now["param_names"]
        if len(listed) != len(now["params"]):
            return f"{len(listed)} param_names for {len(now['params'])} parameters"
        was = {id(p): (n, own) for p, n, own in zip(self.entries, self.names, self.param_names, strict=True)}
        for p, name in zip(now["params"], listed, strict=True):
            model_name, own_name = was.get(id(p), (None, None))
            wanted = names.get(id(p)) if own_name == model_name else own_name
            if name != wanted:
                return f"param_names calls {wanted} {name!r}"
        return None


class Before:
    """A record of a whole run, identities and bits.

    Attributes:
        parameters, names: by name, and names by id.
        tensors: by name (object, bits, requires_grad), parameters and buffers.
        modules: by path (object, train flag, hooks).
        groups, state: per optimizer.
        others: per companion that holds no copy of the network.
        averages: per average the tensors and outputs of each of its copies, and its counts.
        reached: names of the parameters that had got gradients.
        foreign: ids of tensors in optimizers that are not the network's.
    """

    def __init__(self, run: Run):
        model = run.model
        names = {id(p): name for name, p in model.named_parameters()}
        self.names, self.parameters = names, dict(model.named_parameters())
        self.tensors = recorded(model)
        self.modules = {path: (m, m.training, exact(hooks_of(m))) for path, m in model.named_modules()}
        self.groups = [[Group.of(g, names) for g in o.param_groups] for o in run.optimizers]
        self.state = [{n: state_of(o, p) for n, p in self.parameters.items()} for o in run.optimizers]
        left = [model, *run.optimizers]
        self.others = [exact(c, leave_out=left) for c in run.others]
        self.averages = [
            ([(recorded(c), Run(c, [], [], run.probe, None).outputs()) for c in networks_of(a)], counts_of(a))
            for a in run.averages
        ]
        self.reached: set[str] = set().union(*run.reached)
        held = {id(p) for o in run.optimizers for g in o.param_groups for p in g["params"]}
        self.foreign = held - set(names)


def recorded(model: nn.Module) -> dict[str, tuple[Tensor, str, bool]]:
    """Every parameter and buffer by name: object, bits, requires_grad."""
    return {n: (t, digest(t), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())}


def counts_of(average: Any) -> dict[str, Any]:
    """The numbers that an average holds beside its copies: how often it has averaged, a decay."""
    if any(copy is average for copy in networks_of(average)):
        return {}
    numbers = {name: value for name, value in vars(average).items() if type(value) in (bool, int, float)}
    buffers = vars(average).get("_buffers", {})
    return numbers | {name: digest(value) for name, value in buffers.items() if value is not None}


def hooks_of(module: nn.Module) -> dict[str, Any]:
    """The hook dictionaries of a module."""
    return {name: own for name, own in vars(module).items() if name.endswith("hooks")}


def state_of(optimizer: Any, p: Any) -> Facts:
    """What an optimizer keeps for a parameter."""
    own = optimizer.state.get(p, {})
    return {k: (id(v), digest(v)) if isinstance(v, Tensor) else (0, repr(v)) for k, v in own.items()}


def name_after(name: str, change: Change) -> str:
    """The name that a tensor or module of before has after the change."""
    for old, new in sorted(change.renamed.items(), key=lambda pair: -len(pair[0])):
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def changed_by(change: Change) -> set[str]:
    """Old names of tensors that the change itself replaces, resizes, unfreezes or removes."""
    moved = {m.old_name for m in change.moves if m.old_name is not None}
    swapped = {f"{s.path}.{s.name}" if s.path else s.name for s in change.swaps}
    after = {name_after(n, change) for n in swapped}
    return moved | swapped | after | _left_out(change)


def _left_out(change: Change) -> set[str]:
    """Tensors below children that a rewired module no longer has."""
    gone = set()
    for rewire in change.rewires:
        kept = {child for _, child in rewire.children if isinstance(child, str)}
        prefix = f"{rewire.path}." if rewire.path else ""
        inside = [n for n in (*change.before.parameters, *change.before.buffers) if n.startswith(prefix)]
        module = change.before.modules[rewire.path]
        own = {*module._parameters, *module._buffers}
        gone |= {n for n in inside if (head := n[len(prefix) :].split(".")[0]) not in kept and head not in own}
    return gone


def direction(ranks: list[int]) -> str | None:
    """How a list of places runs."""
    if ranks == sorted(ranks):
        return "model order"
    return "reversed model order" if ranks == sorted(ranks, reverse=True) else None


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}

"""``Duplicate``: copies of repeated blocks, the growth that has repeatedly won for language models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from auxin import init as inits
from auxin.anatomy.blocks import Container, hooked_from_outside, in_full, number, passes, replica, shape_of
from auxin.anatomy.depth import followed, numbered, numbers
from auxin.anatomy.numbering import differing
from auxin.anatomy.placed import Placed, taken_apart
from auxin.anatomy.probe import Call, PlanContext
from auxin.anatomy.residual_role import ResidualRole, StandIn, forms_of
from auxin.anatomy.zero_init import arriving, first_tensor
from auxin.change import Assign, Change, New
from auxin.edits.start import fade_in, finish, inside
from auxin.edits.zeroing import kind_of, silence
from auxin.errors import GrowthError, reason
from auxin.gate import close_gates
from auxin.init import InitSite
from auxin.listing import join, named_parameters
from auxin.randomness import random_state

ORDERS = ("interleave", "stack", "middle", "last")
TRIED = 8  # blocks from the end, where a copy of one cannot start silent


class _CannotStartSilent(GrowthError):
    """A copy of one of the blocks changes the function; that of another may not."""


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """Copies of the blocks in the list at ``at``, the old blocks staying what they are.

    Args:
        at: path of a ModuleList, a Sequential or a ModuleDict with numeric keys.
        by: number of new blocks; None: as many as there are.
        order: "interleave" (AABB; where ``by`` does not divide, spread evenly), "stack" (ABAB), "middle" (the middle
            group once more), "last" (the last group once more), or the source index of every block of the new depth.
        content: "copy" of the source's weights, or "fresh" (its modules' ``reset_parameters``, or ``init``).
        output: "zero" (last writers zeroed, so that a copy returns its input, or zeros where the network adds what
            blocks return: the function stays as it was) or "keep".
        state: optimizer state of the copies, "fresh" or "copy".
        fade: optimizer steps over which a copy fades in that cannot be zeroed (a norm behind the residual sum, a block
            without a residual); 0: refuse it.
        init: with content="fresh", how the weights are drawn: a name or a function as in ``Insert``, but "preserve".

    Sources: interleaved zeroed copies LLaMA Pro (arXiv:2401.02415), stacking StackBERT and G_stack (arXiv:2405.15319),
    middle MIDAS (arXiv:2409.19044).

    Examples:
        >>> Duplicate("blocks", by=1).sources(2)
        [0, 1, 1]
    """

    at: str
    by: int | None = None
    order: str | Sequence[int] = "interleave"
    content: str = "copy"
    output: str = "zero"
    state: str = "fresh"
    fade: int = 100
    init: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.order, str):
            object.__setattr__(self, "order", tuple(self.order))
        self._check_words()

    def check(self, model: nn.Module) -> None:
        """Check that there is a list at ``at``, of which that many blocks can be copied.

        Raises:
            GrowthError: there is none.
        """
        container = Container.list_at(model, self.at, "Duplicate")
        if isinstance(self.order, str) and container.names:  # a list of sources is for the depth of its growth; an
            self.sources(len(container.names))  # empty list may be filled before, as in Lightning's configure_model

    @property
    def needs_probe(self) -> str:
        """Why it cannot be planned without a batch; empty where it can."""
        if self.output == "keep":
            return ""
        return (
            f"Duplicate(at={self.at!r}, output='zero') needs one batch to find which weights must be zero: pass "
            "probe=batch. Without one output='keep' would run and change the function."
        )

    def sources(self, length: int) -> list[int]:
        """The source index of every block of the new depth, for a list of ``length`` blocks."""
        by = length if self.by is None else self.by
        where = f"Duplicate(at={self.at!r}, by={self.by!r}, order={self.order!r})"
        if not isinstance(self.order, str):
            return _checked(list(self.order), length, self.by, where)
        if length == 0:
            raise GrowthError(f"{where}: {self.at!r} is empty, there is nothing to copy.")
        if self.order == "interleave":
            copies = [(j + 1) * by // length - j * by // length for j in range(length)]
            return [j for j in range(length) for _ in range(1 + copies[j])]
        if self.order == "stack":
            return [p % length for p in range(length + by)]
        if by > length:
            raise GrowthError(f"{where}: there are {length} blocks; order={self.order!r} copies at most that many.")
        end = length if self.order == "last" else (length - by) // 2 + by
        return [*range(end), *range(end - by, length)]

    def plan(self, model: nn.Module, context: PlanContext) -> Change:
        """Copy the blocks and say where they go. Writes to nothing."""
        try:
            return self._planned(model, context)
        except _CannotStartSilent as error:
            raise GrowthError(f"{error}{self._other_order(model, context)}") from error

    def _other_order(self, model: nn.Module, context: PlanContext) -> str:
        """The order that copies the last block whose copy can start silent, in words; "" if there is none."""
        size = len(self._container(model, False).names)
        for source in [*reversed(range(size))][:TRIED]:
            order = [*range(source + 1), *range(source, size)]
            try:
                dataclasses.replace(self, by=None, order=order)._planned(model, context)
            except GrowthError:
                continue
            return f" A copy of block {source} can: order={order}."
        return ""

    def _planned(self, model: nn.Module, context: PlanContext) -> Change:
        container = self._container(model, context.structural)
        sources = self.sources(len(container.names))
        calls = self._calls(container, sorted(set(_copied(sources))), context)
        promised = self.init is not None
        items: list[str | New] = []
        states: dict[int, nn.Parameter] = {}
        writers: list[str] = []
        gates: list[str] = []
        counterparts: list[str] = []
        known = numbers(container)
        homes = {source: position for position, source in reversed(list(enumerate(sources)))}
        assigns = followed(model, container, sources, homes, known)
        role = _residual_role(context, container, sources, calls, assigns)
        for position, source in enumerate(sources):
            if homes[source] == position:
                items.append(container.names[source])
                continue
            path = join(container.path, str(position))
            site = InitSite(path, calls.get(source), context, (container.child(source), False))
            twin, kept = self._twin(model, container, source, site)
            promised = promised and kept
            new = self._copy(model, container, source, twin, site, role)
            new = dataclasses.replace(new, numbers=numbered(new.module, known, position))
            number(new.module, new.numbers)
            items.append(new)
            original = named_parameters(container.child(source))
            if self.state == "copy":
                states |= {
                    id(p): original[name] for name, p in named_parameters(new.module).items() if name not in new.zeroed
                }
            gates += [path] if new.gated else []
            names = tuple(new.zeroed) or tuple(n for n, p in named_parameters(new.module).items() if p.requires_grad)
            writers += inside(path, names)
            counterparts += inside(join(container.path, str(homes[source])), names)
        rewire = container.renumbered(items)
        copied = [] if context.structural else _copied(sources)
        notes = (*_unlike(container, copied, {number.name for number in known}), *shared_hooks(container, copied))
        zeroed = self.output == "zero" and not context.structural
        return finish(
            model,
            dataclasses.replace(self, by=None, order=tuple(sources)),
            context,
            container,
            rewire,
            sources=states,
            assigns=assigns,
            preserves=zeroed or promised,
            how=("fade-in" if gates else "last writers zero") if zeroed else "its own init" if promised else "copy",
            gates=tuple(gates),
            fade=self.fade,
            writers=tuple(writers),
            counterparts=tuple(counterparts),
            remarks=notes,
        )

    def _container(self, model: nn.Module, replayed: bool) -> Container:
        """The list; refused where a block would be copied that runs the weights of another."""
        container = Container.list_at(model, self.at, "Duplicate")
        again = {name: together for together in passes(container.module) for name in together}
        copied = [container.names[i] for i in _copied(self.sources(len(container.names)))]
        name = next((name for name in copied if name in again), None)
        if name is not None:
            path, others = container.path, ", ".join(join(container.path, n) for n in again[name] if n != name)
            if replayed:
                raise GrowthError(
                    f"Duplicate(at={self.at!r}): the journal copies {join(path, name)}, which shares all its weights "
                    f"with {others} here. If they were not shared in that run, build the network as it was there. "
                    "If they were, an earlier version of auxin wrote this, which does not say whether the copy shares "
                    "them too: load it with that version, and keep what it holds: torch.save(model.state_dict(), "
                    "'weights.pt')."
                )
            raise GrowthError(
                f"Duplicate(at={self.at!r}): {join(path, name)} shares all its weights with {others}, so a copy could "
                f"share them too, or have its own. Give each block its own first: Untie({self.at!r}); or let this one "
                f"run once more: Repeat({self.at!r}, blocks=({name}, {int(name) + 1}))."
            )
        return container

    def _check_words(self) -> None:
        where = f"Duplicate(at={self.at!r}, by={self.by!r}, order={self.order!r})"
        if self.by is not None and (type(self.by) is not int or self.by < 1) and isinstance(self.order, str):
            raise GrowthError(f"{where}: by is the number of new blocks, a whole number from 1.")
        if isinstance(self.order, str) and self.order not in ORDERS:
            raise GrowthError(f"{where}: order is one of {', '.join(map(repr, ORDERS))} or a list of source indices.")
        if not isinstance(self.order, str):
            _checked(list(self.order), len({i for i in self.order if type(i) is int}), self.by, where)
        if self.init == "preserve" or (self.init is not None and self.content != "fresh"):
            raise GrowthError(
                f"Duplicate(at={self.at!r}, content={self.content!r}, init={self.init!r}): init= says how weights are "
                "drawn with content='fresh', by a name such as 'kaiming' or a function; that the function stays is "
                "output='zero'."
            )
        if type(self.fade) is not int or self.fade < 0:
            raise GrowthError(f"Duplicate(at={self.at!r}, fade={self.fade!r}): fade is a number of optimizer steps.")
        for name, value, known in (
            ("content", self.content, ("copy", "fresh")),
            ("output", self.output, ("zero", "keep")),
            ("state", self.state, ("fresh", "copy")),
        ):
            if value not in known:
                raise GrowthError(
                    f"Duplicate(at={self.at!r}, {name}={value!r}): {name} is one of {', '.join(map(repr, known))}."
                )

    def _calls(self, container: Container, wanted: list[int], context: PlanContext) -> dict[int, Call | None]:
        """What arrives at each block that is to be zeroed; None where its kind is remembered and there is no probe."""
        if context.structural or (self.output == "keep" and (self.init is None or not context.has_probe)):
            return {}
        if not context.has_probe:
            if all(kind_of(container.child(i)) in context.memory for i in wanted):
                return dict.fromkeys(wanted)
            raise GrowthError(self.needs_probe)
        seen, _ = context.calls({container.names[i]: container.child(i) for i in wanted})
        calls: dict[int, Call | None] = {i: seen[name] for i in wanted if (name := container.names[i]) in seen}
        missing = [i for i in wanted if i not in calls]
        run = taken_apart(context, [container.child(i) for i in missing]) if missing else []
        for i in missing:
            if not any(container.child(i) is block for block in run):
                path = join(self.at, container.names[i])
                raise GrowthError(
                    f"Duplicate(at={self.at!r}): on this probe the network never calls {path}; a copy would not run "
                    "either."
                )
            calls[i] = _placed(context, container, i)
        return calls

    def _twin(self, model: nn.Module, container: Container, source: int, site: InitSite) -> tuple[nn.Module, bool]:
        """A copy of a block with the weights that are asked for; whether its init promises that the function stays."""
        path, promised = join(container.path, container.names[source]), False
        twin = twin_of(model, container.child(source), f"Duplicate(at={self.at!r}): {path}")
        if self.content == "fresh" and not site.context.structural:
            write: Callable[[], bool] = functools.partial(_reset, model, twin, path)
            if self.init is not None:
                write = functools.partial(inits.run, inits.named(self.init, f"Duplicate(at={self.at!r})"), twin, site)
            promised = _fresh(model, twin, site.seed + source, write)
        close_gates(twin)  # of a block that is fading in itself, or holds one
        return twin, promised

    def _copy(
        self,
        model: nn.Module,
        container: Container,
        source: int,
        twin: nn.Module,
        site: InitSite,
        role: ResidualRole | None,
    ) -> New:
        """The new block, silenced where the function is to stay."""
        original = in_full(model, container.child(source))
        path = join(container.path, container.names[source])
        constants: Mapping[str, float] | None = {}
        if self.output == "zero" and not site.context.structural:
            call, context, where = site.call, site.context, f"Duplicate(at={self.at!r}, output='zero')"
            for form in forms_of(call, role):
                constants = silence(model, original, twin, call, context, where, form)
                if constants is not None:
                    break
            added = role is not None and role.added
            if constants is None and isinstance(call, Placed):
                raise GrowthError(
                    f"{where}: the network's forward calls the parts of {path}, and no tensors of them can be zeroed "
                    "so that it computes what it did and a copy still learns (a norm after the residual sum, parts "
                    "without a residual, or tied weights). output='keep' would run and change the function."
                )
            if constants is None and (added or not (self.fade and fade_in(twin, call))):
                flat = _flat(container, source, call)
                raise _CannotStartSilent(f"{_cannot_start_silent(where, original, self.fade, added, call)}{flat}")
        return New(twin, path if self.content == "copy" else None, constants or {}, gated=constants is None)


def _fresh(model: nn.Module, block: nn.Module, seed: int, write: Callable[[], bool]) -> bool:
    """Let ``write`` draw fresh weights into a block; what the network holds too stays as it is. Returns its answer."""
    held = {id(p) for p in model.parameters()}
    tied = [(p, p.detach().clone()) for p in block.parameters() if id(p) in held]
    with random_state(seed):
        said = write()
    with torch.no_grad():
        for p, value in tied:
            p.copy_(value)
    return said


def twin_of(model: nn.Module, original: nn.Module, where: str, **sharing: Any) -> nn.Module:
    """A deep copy, if the block's own way of copying gives one; ``sharing`` as ``replica`` takes it."""
    try:
        twin = replica(model, original, **sharing)
    except Exception as error:  # whatever a user's __deepcopy__ raises
        raise GrowthError(
            f"{where} ({type(original).__name__}) cannot be copied: {reason(error)}. Build a new one: "
            "Insert(at, layer)."
        ) from error
    if twin is original:
        raise GrowthError(
            f"{where} ({type(original).__name__}) returns itself as its copy. Build a new one: Insert(at, layer)."
        )
    return twin


def _placed(context: PlanContext, container: Container, source: int) -> Placed:
    """The network with one more block behind the source."""
    size = len(container.names)
    items: list[str | New] = [*container.names[: source + 1], New(nn.Identity()), *container.names[source + 1 :]]
    homes = {i: i + (i > source) for i in range(size)}
    assigns = followed(context.model, container, [*range(source + 1), *range(source, size)], homes)
    rewire = container.renumbered(items)
    return Placed(context, rewire, container.aliases(context.model, rewire), assigns)


def _residual_role(
    context: PlanContext,
    container: Container,
    sources: list[int],
    calls: dict[int, Call | None],
    assigns: tuple[Assign, ...],
) -> ResidualRole | None:
    """How copies have to behave; None where nothing was run."""
    items: list[str | New] = []
    for position, source in enumerate(sources):
        call = calls.get(source)
        if source not in sources[:position]:
            items.append(container.names[source])
        elif call is None or isinstance(call, Placed):
            return None
        else:
            items.append(New(StandIn(call)))
    rewire = container.renumbered(items)
    return ResidualRole(context, rewire, assigns)


def _cannot_start_silent(where: str, block: nn.Module, fade: int, added: bool, call: Call | None) -> str:
    """What to say of a block that neither zeros nor a gate make return its input, or nothing."""
    if added:
        return (
            f"{where}: the network adds what its blocks return, as in x + block(x), and no tensors of a "
            f"{type(block).__name__} can be zeroed so that a copy returns zeros and still learns (an activation or a "
            "norm at its end, or tied weights). End it with a Linear; output='keep' would run and change the function."
        )
    return (
        f"{where}: no tensors of a {type(block).__name__} can be zeroed so that a copy returns its input and still "
        "learns (a norm after the residual sum, a block without a residual or with another shape, or tied weights)"
        f"{', and a gate does not make it one either' if fade else '; it can fade in: fade=100'}. "
        f"{_kept_would_run(call)}"
    )


def _kept_would_run(call: Call | None) -> str:
    given, made = (None, None) if call is None else (arriving(call), first_tensor(call.output))
    if given is None or made is None or given[0].shape == made.shape:
        return "output='keep' would run and change the function."
    return (
        f"It turns {shape_of(given[0])} into {shape_of(made)}, which a copy behind it does not take: choose blocks "
        "that keep the shape."
    )


def _flat(container: Container, source: int, call: Call | None) -> str:
    """What to do with a flat Sequential of single layers, where no copy of one keeps what the network computes."""
    block, found = container.child(source), None if call is None else arriving(call)
    if found is None or not isinstance(container.module, nn.Sequential) or block._modules:
        return ""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # the nearest one in front tells what this chain works on
    before = [kind for one in list(container.module)[: source + 1] for kind in layers if isinstance(one, kind)]
    kind = before[-1] if before else nn.Conv2d if found[0].dim() == 4 else nn.Linear
    width = found[0].shape[-1 if kind is nn.Linear else 1]
    sizes = f"{width}, {width}" if kind is nn.Linear else f"{width}, {width}, 3, padding=1"
    return (
        " A flat Sequential holds no blocks to copy. Insert a layer of that width: `def layer(): return torch.nn."
        f"Sequential(torch.nn.{kind.__name__}({sizes}), torch.nn.ReLU())` and "
        f"Insert({container.path!r}, layer, index={source})."
    )


def _copied(sources: list[int]) -> list[int]:
    """Source index of every block that is a copy."""
    seen: set[int] = set()
    copies = []
    for source in sources:
        if source in seen:
            copies.append(source)
        seen.add(source)
    return copies


def _unlike(container: Container, copied: list[int], known: set[str]) -> tuple[str, ...]:
    """A note for each class of copied blocks that differ in plain numbers, such as dilations 1, 2, 4."""
    notes = []
    kinds = {index: type(container.child(index)) for index in range(len(container.names))}
    for kind in dict.fromkeys(kinds[source] for source in copied):
        blocks = {index: container.child(index) for index, other in kinds.items() if other is kind}
        found = list(differing(blocks, known).items())[:4]
        if found:
            sources = [source for source in copied if kinds[source] is kind]
            names = " and ".join(f"{name} ({', '.join(values.values())})" for name, values in found)
            kept = " and ".join(", ".join(values[source] for source in sources) for _, values in found)
            copies = "the copy keeps" if len(sources) == 1 else "the copies keep"
            notes.append(
                f"blocks differ in {names}; {copies} {kept}; Insert({container.path!r}, a factory that takes index) "
                "continues a series"
            )
    return tuple(notes)


def shared_hooks(container: Container, copied: list[int]) -> list[str]:
    """A note for each copied block whose hooks are called for the copy too."""
    paths = {join(container.path, container.names[i]): hooked_from_outside(container.child(i)) for i in set(copied)}
    return [
        f"the hooks on {join(path, inner[0]) if inner[0] else path}{' and others' if inner[1:] else ''} are called for "
        "its copy too"
        for path, inner in paths.items()
        if inner
    ]


def _checked(sources: list[int], length: int, by: int | None, where: str) -> list[int]:
    ints = all(type(s) is int and 0 <= s < length for s in sources)
    firsts = list(dict.fromkeys(sources))
    if not ints or firsts != list(range(length)) or len(sources) == length:
        raise GrowthError(
            f"{where}: a list names the source block of each position of the new depth: every old index "
            f"0..{length - 1}, in order of first use, and at least one of them again, e.g. [0, 0, 1, 1]."
        )
    if by is not None and by != len(sources) - length:
        raise GrowthError(
            f"{where}: the list adds {len(sources) - length} blocks, by={by} says otherwise; leave by out."
        )
    return sources


def _reset(model: nn.Module, block: nn.Module, path: str) -> bool:
    """Fresh weights by each module's own ``reset_parameters``; nothing is promised of them."""
    known = {id(m) for m in model.modules()}
    with torch.no_grad():
        for name, module in block.named_modules():
            own = [leaf for leaf, p in module._parameters.items() if p is not None]
            reset: Any = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if id(module) in known:
                continue
            if callable(reset):
                reset()
            elif own:
                raise GrowthError(
                    f"Duplicate(content='fresh'): {join(path, name)} ({type(module).__name__}) holds "
                    f"{', '.join(own)} and has no reset_parameters(); give it one, or use init=, or content='copy'."
                )
    return False

"""A second tree over the same blocks: other containers, which know nothing of a growth of the first.

Regional compilation (``accelerate.utils.compile_regions``) returns a tree of containers of its own around the blocks of
the network, and keeps that one in ``__dict__["_orig_mod"]``. A user's own ``nn.Sequential(*self.blocks)``, kept in a
plain attribute so that it is not registered twice, is another. Both grow in step, or the growth is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from auxin import dynamo
from auxin.change import MISSING, Assign, Change, New, Rewire
from auxin.companion import SECOND_TREE
from auxin.errors import GrowthError
from auxin.follow import follow
from auxin.listing import join, own_names
from auxin.record import content_of, refill
from auxin.structure import Undo, assign_to, splice, undo

Write = Callable[[list[Undo]], None]  # brings something into step; what it is given collects the way back
DEPTH = 4  # of lists and dicts within each other


@follow(SECOND_TREE)
def follow_second_tree(tree: nn.Module, change: Change) -> Iterator[None]:
    """The tree that was put around the network, as regional compilation does it.

    Raises:
        GrowthError: it stands around another network, or holds other children than it.
    """
    yield from _followed([in_step(tree, change.before.modules, change)])


def follow_views(change: Change) -> Iterator[None]:
    """What plain attributes of the network hold: containers of the same blocks, lists of them in lists.

    A teacher or an average that shares no block is none of it.

    Raises:
        GrowthError: it is not known what should become of one; names it.
    """
    modules = change.before.modules if change.rewires else {}
    known = {id(module) for module in modules.values()}
    beside = [one for path, module in modules.items() for one in _beside(path, module, known)]
    children = _children_of(modules) if beside else {}
    views = [_view(*one, r, children.get(r.path, {})) for r in change.rewires for one in beside]
    yield from _followed([view for view in views if view is not None])


def _followed(writes: Sequence[Write]) -> Iterator[None]:
    undos: list[Undo] = []
    yield
    try:
        for write in writes:
            write(undos)
        yield
    except GeneratorExit:
        raise
    except BaseException:
        undo(undos)
        raise


def _children_of(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    """By path the children that each module had, by name."""
    found: dict[str, dict[str, nn.Module]] = {path: {} for path in modules}
    for path, module in modules.items():
        if path:
            found[path.rpartition(".")[0]][path.rpartition(".")[2]] = module
    return found


def _compiled_as(module: nn.Module, siblings: Sequence[nn.Module | None]) -> nn.Module:
    """A new module for a container in which other modules stand: compiled where they are."""
    like = next((one for one in siblings if one is not None and dynamo.is_wrapper(one)), None)
    compiler = None if like is None or dynamo.is_wrapper(module) else dynamo.compiler_of(like)
    return module if compiler is None else compiler(module)


def _inner(module: Any) -> Any:
    return module._modules["_orig_mod"] if isinstance(module, nn.Module) and dynamo.is_wrapper(module) else module


# ---- a tree of the same paths


def in_step(tree: nn.Module, modules: Mapping[str, nn.Module], change: Change) -> Write:
    """How a tree follows the network that it stands around, once that has changed.

    Args:
        tree: has the network's paths; its containers are its own, its blocks are the network's or wrap them.
        modules: of the network, by path before the change.
        change: the change.

    Raises:
        GrowthError: the tree has another structure.
    """
    children = _children_of(modules)
    own = dict(_own_containers(tree, modules, children))

    def write(undos: list[Undo]) -> None:
        for path, node in own.items():
            held = {id(child): node._modules.get(name) for name, child in children[path].items()}
            held |= {id(_inner(child)): child for child in node._modules.values()}
            beside = list(node._modules.values())
            now = {
                name: held[id(child)] if child is None or id(child) in held else _compiled_as(child, beside)
                for name, child in modules[path]._modules.items()
            }
            if list(node._modules.items()) != list(now.items()):
                splice(node, now, undos)
        for path, name in [(a.path, a.name) for a in (*change.assigns, *change.aliases) if a.path in own]:
            if "." not in name:  # an object that a dotted name leads through is the network's own
                assign_to(own[path], Assign(path, name, None, modules[path].__dict__.get(name, MISSING)), undos)

    return write


def _own_containers(
    node: nn.Module, modules: Mapping[str, nn.Module], children: Mapping[str, Mapping[str, nn.Module]], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all containers of a tree that are not the network's."""
    if dynamo.is_wrapper(node) or node is modules.get(path):
        return
    lacking = [join(path, name) for name in children.get(path, {}) if name not in node._modules]
    if path not in modules or lacking:
        raise GrowthError(
            f"the {type(node).__name__} that was passed stands around a network with other blocks than its own: only "
            f"one of the two has {', '.join(lacking) or path}. It was grown without the other; build it anew from the "
            "network as it is now."
        )
    yield path, node
    for name, child in node._modules.items():
        if child is not None and child is not children[path].get(name):
            yield from _own_containers(child, modules, children, join(path, name))


# ---- what plain attributes hold


def _beside(path: str, module: nn.Module, known: set[int]) -> Iterator[tuple[str, Any]]:
    """Where and what: containers, lists and dicts in plain attributes of a module that are no part of the network."""
    for name in own_names(module.__dict__):
        value = module.__dict__[name]
        if name == "_orig_mod" or _is_plain(value):
            continue
        level = [(join(path, name), value)]
        for depth in range(DEPTH):
            deeper: list[tuple[str, Any]] = []
            for where, one in level:
                if isinstance(one, nn.Module) and id(one) not in known:
                    yield from ((join(where, inner), m) for inner, m in one.named_modules() if id(m) not in known)
                elif type(one) in (list, tuple, dict):
                    if depth or type(one) is dict:  # a list or tuple itself is an alias of the edit's
                        yield where, one
                    held = _items(one).items()
                    deeper += [(f"{where}[{key!r}]", item) for key, item in held if not _is_plain(item)]
            level = deeper


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (nn.Module, list, tuple, dict))


def _view(where: str, held: Any, rewire: Rewire, old: Mapping[str, nn.Module]) -> Write | None:
    """How something that holds the children of a module a second time gets those that it has after ``rewire``.

    Raises:
        GrowthError: it holds some of them, and it is not known what should stand there afterwards.
    """
    items = _items(held)
    inside = [id(_inner(value)) for value in items.values()]
    before = {name: id(child) for name, child in old.items()}
    after = [(name, child) for name, child in rewire.children if child is not None]
    shared = set(inside) & set(before.values())
    if not shared or inside == [id(c.module) if isinstance(c, New) else before.get(c) for _, c in after]:
        return None
    whole = inside == list(before.values())
    numbered = isinstance(held, (list, nn.ModuleList, nn.Sequential))
    if whole and (numbered or (isinstance(held, (dict, nn.ModuleDict)) and list(items) == list(before))):
        values = dict(zip(before, items.values(), strict=True))
        now = [c.module if isinstance(c, New) else values[c] for _, c in after]
        names = range(len(now)) if numbered else [name for name, _ in after]
        return functools.partial(_hold, held, names, now)
    left = {before.get(child) for _, child in after if isinstance(child, str)}
    if not shared <= left or (len(shared) > 1 and (whole or isinstance(held, nn.Module))):
        raise GrowthError(
            f"{where} holds {'blocks' if len(shared) > 1 else 'a block'} of {rewire.path or 'the network'} a second "
            "time, and it is not known what should stand there after this growth. What is followed is a list, a "
            "Sequential or a ModuleList of all of them in their order. Delete it before, and build it anew after."
        )
    return None


def _items(held: Any) -> dict[Any, Any]:
    """What a module, list, tuple or dict holds."""
    if isinstance(held, nn.Module):
        return {} if dynamo.is_wrapper(held) else dict(held._modules)
    return dict(held) if isinstance(held, dict) else dict(enumerate(held))


def _hold(held: Any, names: Sequence[Any], values: Sequence[nn.Module], undos: list[Undo]) -> None:
    """Let a container, list or dict hold these modules; new ones compiled as those beside them."""
    beside = list(_items(held).values())
    known = {id(one) for one in beside}
    now = [value if id(value) in known else _compiled_as(value, beside) for value in values]
    if isinstance(held, nn.Module):
        splice(held, {str(name): value for name, value in zip(names, now, strict=True)}, undos)
        return
    undos.append(functools.partial(refill, held, content_of(held)))
    refill(held, now if isinstance(held, list) else list(zip(names, now, strict=True)))

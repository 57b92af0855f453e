"""One optimizer of another package through everything that a run does to it, each judged against a run that never grew.

Batches and gradients are given by numbers alone, so that two runs of one optimizer are equal to the bit. A copied block
begins with last writers of zero: while its own gradients are zero, the old parameters have to step as if it were not
there. Its own first steps have to be those that a fresh optimizer makes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).parent.parent / "scenarios"))
from growing import Block, Net, batch, picture
from their_optimizers import CLOSURE, WIDE, classes, is_in, make

import auxin as ax

WARM, STEPS = 12, 3
COLUMNS = ("grow", "state", "wider", "rates", "save, load", "undo", "surgery")
EDIT = ax.Duplicate("blocks", by=1)
# What an optimizer has learned of the whole network, and its new block is to begin with.
LEARNED = {"*.Prodigy": ("d", "d_max"), "*DAdapt*": ("d",), "pytorch_optimizer.ASGD": ("lr", "theta")}
EXACT, ALIKE = 1e-6, 0.02  # relative difference of steps; of first ones, in which an epsilon may weigh otherwise


@dataclasses.dataclass
class Cell:
    """What came of one column: right, refused or wrong, and how exact it was, or why not."""

    verdict: str
    why: str = ""


class Wrong(Exception):
    """What auxin did was not right."""


class Run:
    """A network under one optimizer, trained for some steps; always the same one."""

    def __init__(self, name: str, rate: Callable[[int], float] | None = None, train: bool = True):
        torch.manual_seed(0)
        self.name = name
        self.model = Net(dim=64 if is_in(name, WIDE) else 8)
        self.optimizers = make(name, self.model)
        self.optimizer = self.optimizers[0]
        self.schedules = [LambdaLR(one, rate) for one in self.optimizers] if rate else []
        ready(self.optimizer)
        self.number = 0
        for _ in range(WARM if train else 0):
            self.step(self.by_loss)

    @property
    def companions(self) -> list[Any]:
        return [*self.optimizers, *self.schedules]

    def grower(self) -> ax.Grower:
        return ax.Grower(self.model, *self.companions, edits=EDIT, when=ax.when.every(10**9), probe=batch()[0])

    def grow(self, edit: Any = EDIT, **options: Any) -> Any:
        was = picture(self.model, *self.optimizers)
        try:
            return ax.grow(self.model, edit, *self.companions, probe=batch()[0], **options)
        except ax.GrowthError:
            now = picture(self.model, *self.optimizers)
            changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
            if changed:
                raise Wrong(f"a growth that is refused has changed {changed[:3]}") from None
            raise

    def step(self, backward: Callable[[], Tensor]) -> None:
        """One step of all optimizers; randomness that it draws is that of its number."""
        torch.manual_seed(self.number)

        def closure() -> Tensor:
            with torch.enable_grad():
                return backward()

        asks = is_in(self.name, CLOSURE)
        loss = None if asks else closure()
        for optimizer in self.optimizers:
            optimizer.step(*([closure] if asks else []))
        for schedule in self.schedules:
            schedule.step()
        del loss
        self.model.zero_grad()
        self.number += 1

    def by_loss(self) -> Tensor:
        """Gradients of a regression."""
        self.model.zero_grad()
        x, y = batch(self.number)
        loss = nn.functional.mse_loss(self.model(x), y)
        loss.backward()
        return loss

    def given(self, only: Any = None, as_of: dict[str, str] | None = None) -> Callable[[], Tensor]:
        """Gradients by name and number of the step; zero where not in ``only``."""

        def backward() -> Tensor:
            for name, p in self.model.named_parameters():
                told = (as_of or {}).get(name, name)
                seed = sum(ord(c) * (k + 1) for k, c in enumerate(told)) + 7919 * self.number
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
                if only is not None and name not in only:
                    p.grad = torch.zeros_like(p)
            return torch.tensor(1.0)

        return backward

    def go_on(self, count: int = STEPS, **words: Any) -> list[dict[str, Tensor]]:
        """Some steps on given gradients; how far each parameter has moved in each."""
        moved = []
        for _ in range(count):
            before = self.values()
            self.step(self.given(**words))
            moved.append({name: value - before[name] for name, value in self.values().items()})
        return moved

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def ready(optimizer: Any) -> None:
    """For steps, as those without a schedule ask for."""
    with contextlib.suppress(AttributeError):  # of the one inside
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference."""
    return max(float((ours[n] - t).abs().max() / t.abs().max().clamp(min=1e-30)) for n, t in theirs.items())


def compare(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], limit: float, what: str) -> str:
    """How far two series of steps are apart, in words.

    Raises:
        Wrong: too far.
    """
    apart = max(distance(mine, other) for mine, other in zip(ours, theirs, strict=True))
    if not apart <= limit:
        raise Wrong(f"{what}: {apart:.2g} off")
    return "" if apart == 0 else f"{apart:.0e}"


def renamed(change: Any, names: Any) -> dict[str, str]:
    """Name now -> name before, of all old parameters."""
    found = {}
    for name in names:
        new = name
        for old_path, new_path in sorted(change.renamed.items(), key=lambda pair: -len(pair[0])):
            if name.startswith(f"{old_path}."):
                new = new_path + name[len(old_path) :]
                break
        found[new] = name
    return found


def old_go_on(run: Run, twin: Run, change: Any) -> str:
    """Old parameters step as those of a run that never grew, while the new ones have gradients of zero."""
    olds = renamed(change, dict(twin.model.named_parameters()))
    ours, theirs = run.go_on(only=olds, as_of=olds), twin.go_on()
    ours = [{olds[n]: v for n, v in moved.items() if n in olds} for moved in ours]
    return compare(ours, theirs, EXACT, "old parameters step otherwise than without the growth")


def beside(run: Run) -> Run:
    """The network of a run under a fresh optimizer."""
    fresh = Run(run.name, train=False)
    fresh.model, fresh.number = copy.deepcopy(run.model), run.number
    fresh.optimizers = make(run.name, fresh.model)
    fresh.optimizer = fresh.optimizers[0]
    ready(fresh.optimizer)
    return fresh


def new_begin(run: Run, olds: dict[str, str]) -> str:
    """New parameters step as under a fresh optimizer."""
    fresh = beside(run)
    new = [n for n, _ in run.model.named_parameters() if n not in olds]
    learned = [key for pattern, keys in LEARNED.items() if is_in(run.name, [pattern]) for key in keys]
    for key in learned:
        fresh.optimizer.param_groups[0][key] = copy.deepcopy(run.optimizer.param_groups[0][key])
    count = 1 if learned else 8
    ours, theirs = ([{n: m[n] for n in new} for m in one.go_on(count)] for one in (run, fresh))
    return compare(ours, theirs, ALIKE, "new parameters begin otherwise than under a fresh optimizer")


def grow(name: str) -> str:
    run, twin = Run(name), Run(name)
    output = run.model(batch()[0])
    change = run.grow()
    if not torch.equal(output, run.model(batch()[0])):
        raise Wrong("the function is another")
    ax.verify(run.model, *run.companions)
    said = old_go_on(run, twin, change)
    run = Run(name)
    olds = renamed(run.grow(), twin.values())
    more = new_begin(run, olds)
    return said or more


def state(name: str) -> str:
    """``state="copy"``: what is not zeroed steps as its source does on the same gradients."""
    run, twin = Run(name), Run(name)
    was = states(run)
    change = run.grow(ax.Duplicate("blocks", by=1, state="copy"))
    olds = renamed(change, twin.values())
    now = states(run)
    if any(now[new] != was[old] for new, old in olds.items()):
        raise Wrong("the state of an old parameter has changed")
    like = {f"blocks.2.{rest}": f"blocks.1.{rest}" for rest in ("up.weight", "up.bias", "norm.weight", "norm.bias")}
    moved = run.go_on(as_of=like)
    ours = [{like[n]: m[n] for n in like} for m in moved]
    return compare(ours, [{n: m[n] for n in like.values()} for m in moved], 1e-4, "a copied state steps otherwise")


def states(run: Run) -> dict[str, Any]:
    """By name what the optimizers keep of each parameter, to the bit."""
    seen = {}
    for optimizer in run.optimizers:
        told = picture(optimizer)
        for name, p in run.model.named_parameters():
            found = [v for key, v in told.items() if key.endswith(f"state {id(p)}")]
            seen.setdefault(name, []).append(repr(found))
    return seen


def wider(name: str) -> str:
    """Old entries of a widened layer go on, while the new ones have gradients of zero."""
    run, twin = Run(name), Run(name)
    shapes = {n: v.shape for n, v in run.values().items()}
    run.grow(ax.Widen("blocks.*.up", by=8, init="zero"))

    def narrow(one: Run) -> Callable[[], Tensor]:
        def backward() -> Tensor:
            for n, p in one.model.named_parameters():
                seed = sum(ord(c) * (k + 1) for k, c in enumerate(n)) + 7919 * one.number
                g = torch.randn(shapes[n], generator=torch.Generator().manual_seed(seed)) * 0.01
                p.grad = torch.zeros_like(p)
                p.grad[tuple(map(slice, shapes[n]))] = g
            return torch.tensor(1.0)

        return backward

    ours, theirs = [], []
    for _ in range(STEPS):
        for one, moved in ((run, ours), (twin, theirs)):
            before = one.values()
            one.step(narrow(one))
            now = {n: v - before[n] for n, v in one.values().items()}
            moved.append({n: v[tuple(map(slice, shapes[n]))] for n, v in now.items()})
    try:
        return compare(ours, theirs, 1e-5, "")
    except Wrong:
        flat = [
            torch.cat([m[n].flatten() for n in m if shapes[n] != dict(run.model.named_parameters())[n].shape])
            for moved in (ours, theirs)
            for m in moved
        ]
        a, b = torch.stack(flat[:STEPS]), torch.stack(flat[STEPS:])
        cosine = float(torch.nn.functional.cosine_similarity(a, b).min())
        ratio = (a.norm(dim=1) / b.norm(dim=1)).tolist()
        if cosine > 0.95 and all(0.5 < r < 2 for r in ratio):
            return f"as a whole (cosine {cosine:.2f}, length {ratio[0]:.2f})"
        raise Wrong(f"old entries step otherwise: cosine {cosine:.2f}, lengths {ratio}") from None


def falling(step: int) -> float:
    """A schedule."""
    return 0.9**step


def rates(name: str) -> str:
    """A schedule goes on, and a group of its own is at half the rate of the others all along."""
    if "lr" not in Run(name, train=False).optimizer.param_groups[0]:
        return "it has no learning rate"
    run, twin, joined = (Run(name, falling) for _ in range(3))
    base = run.optimizer.param_groups[0].get("initial_lr")
    change = run.grow(group={"lr": float(base) / 2})
    shares = [own.lr / own.reference for own in change.groups if own.optimizer is run.optimizer]
    donors = [own.donor for own in change.groups if own.optimizer is run.optimizer]
    joined.grow()
    homes = len(twin.optimizer.param_groups)
    fresh = _first_step(run, float(run.optimizer.param_groups[homes]["lr"])) if len(shares) == 1 else 0.0
    for number in range(STEPS):
        ours, _, beside = (one.go_on(1)[0] for one in (run, twin, joined))
        now, was = ([float(g["lr"]) for g in one.optimizer.param_groups] for one in (run, twin))
        if now[:homes] != was:
            raise Wrong(f"rates {now}, without a growth {was}")
        wanted = [was[donor] * share for donor, share in zip(donors, shares, strict=True)]
        if any(abs(a - b) > 1e-9 * b for a, b in zip(now[homes:], wanted, strict=True)):
            raise Wrong(f"own groups at {now[homes:]}, not at {wanted}")
        if len(shares) == 1 and number == 0:
            far = [float(moved["blocks.2.up.weight"].norm()) for moved in (ours, beside)]
            if far[1] and abs(far[0] / far[1] - shares[0]) > ALIKE and abs(far[0] / fresh - 1) > ALIKE:
                raise Wrong(f"at {shares[0]:g} times the rate it steps {far[0] / far[1]:.2f} times as far")
    return ""


def _first_step(run: Run, rate: float) -> float:
    """How far a fresh optimizer at a rate takes the copied block's weights, on the gradients of the next step."""
    fresh = beside(run)
    for group in fresh.optimizer.param_groups:
        group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate
    return float(fresh.go_on(1)[0]["blocks.2.up.weight"].norm())


def save_and_load(name: str, directory: Path) -> str:
    """Written here; ``reload.py`` goes on in another process, and says by how much it differs."""
    run = Run(name)
    grower = run.grower()
    grower.grow(EDIT)
    run.go_on(2)
    ax.save(grower, directory)
    run.go_on()
    torch.save((run.number, run.values()), directory / "wanted.pt")
    return "saved"


def loaded(name: str, directory: Path) -> str:
    """The other half."""
    number, wanted = torch.load(directory / "wanted.pt")
    ax.follow(classes()[name], like=torch.optim.AdamW)
    run = Run(name, train=False)
    ax.load(directory, run.grower())
    run.number = number - STEPS
    run.go_on()
    return compare([run.values()], [wanted], 0.0, "goes on otherwise from a checkpoint")


def undo(name: str) -> str:
    run, twin = Run(name), Run(name)
    was = picture(run.model, *run.optimizers)
    grower = run.grower()
    grower.grow(EDIT)
    grower.undo()
    now = picture(run.model, *run.optimizers)
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and not key.startswith("rng")]
    changed = [key for key in changed if not key.endswith("hooks")]
    if changed:
        raise Wrong(f"undo leaves {changed[:3]}")
    return compare(run.go_on(), twin.go_on(), 0.0, "goes on otherwise after undo")


def surgery(name: str) -> str:
    run, twin = Run(name), Run(name)
    with ax.surgery(run.model, *run.companions):
        block = Block(run.model.stem.out_features)
        nn.init.zeros_(block.down.weight)
        nn.init.zeros_(block.down.bias)
        run.model.blocks.insert(1, block)
    olds = {n.replace("blocks.1.", "blocks.2."): n for n in twin.values()}
    ours, theirs = run.go_on(only=olds, as_of=olds), twin.go_on()
    ours = [{olds[n]: v for n, v in moved.items() if n in olds} for moved in ours]
    return compare(ours, theirs, EXACT, "old parameters step otherwise than without the growth")


PARTS: dict[str, Callable[..., str]] = dict(
    zip(COLUMNS, (grow, state, wider, rates, save_and_load, undo, surgery), strict=True)
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing, of warnings neither."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def cell(part: Callable[..., str], *given: Any) -> Cell:
    """Right, refused by name, or wrong."""
    with quiet():
        try:
            return Cell("right", part(*given))
        except ax.GrowthError as error:
            return Cell("refused", str(error))
        except Wrong as error:
            return Cell("wrong", str(error))
        except Exception as error:
            return Cell("wrong", f"{type(error).__name__}: {error}"[:300])


def trial(name: str, directory: Path) -> dict[str, Cell]:
    """All columns of one optimizer; it is registered in one statement, whatever it is."""
    torch.set_num_threads(1)
    ax.follow(classes()[name], like=torch.optim.AdamW)
    return {column: cell(part, name, *([directory] if part is save_and_load else [])) for column, part in PARTS.items()}

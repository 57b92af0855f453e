"""Hooks that take second moments while a network trains, or in a pass."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from auxin.dynamo import is_wrapper
from auxin.errors import GrowthError, reason
from auxin.statistics.mixing import mixing_of
from auxin.statistics.moments import (
    WORKSPACE,
    PairMoments,
    SiteMoments,
    Sums,
    add_pair,
    add_site,
    bytes_of,
    pair_moments,
    pair_shapes,
)
from auxin.statistics.places import Pair, Proposal, Site, layer_at, matching, refuse_compiled, seen_at
from auxin.statistics.rows import CONVOLUTIONS, Geometry

Place = Pair | Site
WHERE = "statistics"


def watch(
    model: nn.Module,
    places: Iterable[Place],
    *,
    every: int | tuple[int, int] = 1,
    loss_scale: float | Callable[[], float] = 1.0,
    limit: int = 2**30,
    quiet: bool = False,
) -> Watch:
    """Take second moments during ordinary training steps, of every sample that a backward pass goes through.

    The loss has to be a mean over the samples of a batch. What a step computes is not changed; train and eval mode,
    random numbers and gradients are left alone. Forwards without gradients (a validation) are passed over. Where a
    layer is called several times before the backward, as with shared weights, its calls are summed.

    Args:
        model: The network, or the DistributedDataParallel around it: then every rank sums its own samples, and
            ``reduce()`` adds them up.
        places: Pairs and sites.
        every: One step in so many; or (how many, out of how many), as in (2, 100).
        loss_scale: What the loss is multiplied with before ``backward()``: 1 / k where gradients of k batches are
            accumulated, ``scaler.get_scale`` with a GradScaler; a number, or a function that is asked at each step.
        limit: Bytes that the sums may take.
        quiet: Do not print what will be taken, and how many bytes it needs.

    Returns:
        A context manager. Its hooks are gone when it is left, however that is.

    Raises:
        GrowthError: A hook there would not be called, statistics cannot be taken of such a layer, or the sums would be
            larger than ``limit``.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with watch(net, [Pair("0", "2")], quiet=True) as seen:
        ...     net(torch.randn(16, 4)).square().sum(1).mean().backward()
        >>> seen.moments(Pair("0", "2")).M.shape  # X^T D / N, with the row for the bias
        torch.Size([5, 2])
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    if is_wrapper(network):
        refuse_compiled(network, "", "statistics")
    return Watch(network, places, every=every, loss_scale=loss_scale, limit=limit, quiet=quiet)


class Watch:
    """What ``watch`` returns; see there.

    Attributes:
        memory: Bytes that the sums take on each rank; the rows that are worked on at once take at most 64 MiB more.
        skipped: Backward passes that were left out, since their gradient was not finite.
        eager: Whether this is a pass of our own, in which nothing runs compiled.
        looking: Whether gradients that come just now are not those of the loss.
        failure: What went wrong inside a hook, if anything did. It is raised by ``moments``, never in a training step.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Iterable[Place],
        *,
        proposals: Mapping[Pair, Proposal] | None = None,
        every: int | tuple[int, int] = 1,
        loss_scale: float | Callable[[], float] = 1.0,
        limit: int = 2**30,
        quiet: bool = False,
        eager: bool = False,
    ):
        self._model, self.eager = model, eager
        self._turns = _turns(every)
        self._loss_scale = loss_scale
        self._quiet = quiet
        self.skipped, self.failure = 0, None
        self._taps: dict[Place, _Tap] = {}
        for place in places:
            self._taps[place] = self._tap(place, proposals or {})
        if not self._taps:
            raise GrowthError("statistics: there is no place to look at; pass [Pair(producer, consumer), Site(path)].")
        self.memory = sum(tap.bytes for tap in self._taps.values())
        if self.memory > limit:
            most = max(self._taps.values(), key=lambda tap: tap.bytes)
            raise GrowthError(
                f"statistics: the sums would take {_size(self.memory)}, {_size(most.bytes)} of it at "
                f"{most.place}; the limit is {_size(limit)}. Pass fewer places, or limit={self.memory} (bytes)."
            )
        self._handles: list[RemovableHandle] = []
        self._seen = 0  # steps begun
        self._active = self._turns[0] > 0
        self.looking = False
        self._answered = True  # a gradient has come since the step began: the next forward begins another
        self._passes: set[int] = set()  # backward passes of this step

    def __repr__(self) -> str:
        few, many = self._turns
        turns = "every step" if few == many else f"{few} of {many} steps"
        return f"statistics at {len(self._taps)} places, {turns}: {_size(self.memory)} of sums, and at most " + (
            f"{_size(WORKSPACE)} of rows at once"
        )

    def __enter__(self) -> Watch:
        if not self._quiet:
            print(self)
        try:
            for tap in self._taps.values():
                tap.begin()
                self._handles += tap.hooks(self)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; the sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for tap in self._taps.values():
            tap.waiting.clear()

    def reduce(self, group: Any = None) -> None:
        """Add up the sums of all ranks of a process group; every rank of it has to call this, once, after the steps.

        Args:
            group: As in ``torch.distributed.all_reduce``; None: all.
        """
        for tap in self._taps.values():
            sums = tap.sums.settle()
            for name in sorted(sums):
                dist.all_reduce(sums[name], group=group)
            counts = torch.tensor([tap.sums.samples, *tap.sums.rows], device=tap.device)
            dist.all_reduce(counts, group=group)
            tap.sums.samples, *tap.sums.rows = counts.tolist()

    def moments(self, place: Place) -> Any:
        """The second moments at a pair (``PairMoments``) or a site (``SiteMoments``), so far.

        Raises:
            GrowthError: Something went wrong inside a hook, or no gradient has come to that place.
        """
        if self.failure is not None:
            raise GrowthError(f"statistics: {reason(self.failure)}.") from self.failure
        if place not in self._taps:
            raise GrowthError(f"statistics: {place} was not watched; watched are {', '.join(map(str, self._taps))}.")
        tap = self._taps[place]
        if not tap.sums.samples:
            raise GrowthError(f"statistics at {place}: {tap.why_nothing(self.skipped)}")
        return tap.moments()

    # What the hooks of the taps ask.

    def begins(self, output: Any) -> bool:
        """Whether this call is to be looked at; a forward behind a backward begins a new step."""
        if self.failure is not None or not torch.is_grad_enabled():
            return False
        now = _backward_pass()
        if self._answered and now not in self._passes:
            few, many = self._turns
            self._active = self._seen % many < few
            self._seen += 1
            self._answered, self._passes = False, set()
            for tap in self._taps.values():
                tap.waiting.clear()
                tap.batch = 0
            if not self._active and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda _: self._answer())
        if now != FORWARD:  # what an activation checkpoint computes again
            self._passes.add(now)
        return self._active

    def listening(self, output: Tensor) -> Tensor | None:
        """In a pass of our own, where the network is frozen: the same values, with a gradient; None: as it is."""
        if not self.eager or output.requires_grad or not output.is_floating_point():
            return None
        return output + torch.zeros((), dtype=output.dtype, device=output.device).requires_grad_()

    @property
    def called(self) -> bool:
        """Whether any place was called with gradients on."""
        return any(tap.called for tap in self._taps.values())

    def _answer(self) -> None:
        self._answered = True
        self._passes.add(_backward_pass())

    def asked(self, tap: _Tap, gradient: Tensor, add: Callable[[Tensor], None]) -> None:
        """Take in one gradient: ``add`` is given D. Never raises."""
        if self.looking:
            return
        self._answer()
        if self.failure is not None:
            return
        try:
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                scale = self._loss_scale() if callable(self._loss_scale) else self._loss_scale
                gradient = gradient.detach().to(tap.dtype)
                if not bool(gradient.sum().isfinite()):
                    self.skipped += 1
                    return
                batch = tap.batch or len(gradient)
                add(gradient * (-batch / scale))
                if not tap.batch:
                    tap.batch = batch
                    tap.sums.samples += batch
        except Exception as error:  # a training step is not to fail for this
            self.failure = error

    def _tap(self, place: Place, proposals: Mapping[Pair, Proposal]) -> _Tap:
        if isinstance(place, Site):
            return _SiteTap(place, seen_at(self._model, place.at, WHERE, self.eager), self._model)
        if not isinstance(place, Pair):
            raise GrowthError(f"statistics: {place!r} is no place; pass Pair(producer, consumer) or Site(path).")
        layers = [None if path is None else layer_at(self._model, path, WHERE, self.eager) for path in _paths(place)]
        producer, consumer = (None if layer is None else Geometry.of(layer) for layer in layers)
        assert consumer is not None
        if producer is not None:
            matching(place, producer, consumer, WHERE)
        return _PairTap(place, layers, (producer, consumer), proposals.get(place))


class _Tap:
    """Hooks at one place, and its sums."""

    place: Any
    shapes: dict[str, tuple[int, ...]]
    device: torch.device
    dtype: torch.dtype

    def __init__(self, module: nn.Module, model: nn.Module) -> None:
        self.waiting: deque[tuple[Tensor, int, Tensor]] = deque()
        self.batch = 0  # samples of this step; 0: no gradient has come yet
        self.called, self.without = 0, 0
        first = next((p for m in (module, model) for p in m.parameters() if p.is_floating_point()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.dtype = torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32
        self.sums: Sums

    @property
    def bytes(self) -> int:
        """That the sums take."""
        return bytes_of(self.shapes, self.dtype)

    def begin(self) -> None:
        self.sums = Sums.zeros(self.shapes, self.device)
        self.sums.tolerance = 1e-12 if self.dtype == torch.float64 else 1e-6

    def hooks(self, seen: Watch) -> list[RemovableHandle]:
        raise NotImplementedError

    def moments(self) -> Any:
        raise NotImplementedError

    def why_nothing(self, skipped: int) -> str:
        """Why there are no samples."""
        if not self.called:
            return (
                "it was never called as a module with gradients on. Either the network did not run inside the block, "
                "or it was compiled before, or the network uses its weights without calling it (as "
                "nn.MultiheadAttention does): take a Site behind the module around it."
            )
        if skipped:
            return f"none of the gradients that came was finite ({skipped} backward passes left out)."
        if self.without:
            return "what comes out there needs no gradient: nothing in front of it, nor itself, trains."
        return "it was called, but no gradient has come back: call backward() inside the block."


class _PairTap(_Tap):
    def __init__(
        self,
        place: Pair,
        layers: Sequence[nn.Module | None],
        geometries: tuple[Geometry | None, Geometry | None],
        proposal: Proposal | None,
    ):
        producer, consumer = geometries
        assert layers[1] is not None and consumer is not None
        super().__init__(layers[1], layers[1])
        self.place, self.layers, self.geometries, self.proposal = place, layers, (producer, consumer), proposal
        self.shapes = pair_shapes(producer, consumer, proposal, place.direct)
        self.looked = False

    def hooks(self, seen: Watch) -> list[RemovableHandle]:
        producer, consumer = self.layers
        assert consumer is not None

        def produced(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not seen.begins(output):
                return None
            replaced = seen.listening(output) if not self.looked else None
            self.waiting.append((args[0].detach(), args[0]._version, output if replaced is None else replaced))
            return replaced

        def consumed(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not seen.begins(output):
                return None
            self.called += 1
            replaced = seen.listening(output)
            output = output if replaced is None else replaced
            if not output.requires_grad:
                self.without += 1
                return None
            try:
                self._listen(seen, args[0], output)
            except GrowthError as error:
                seen.failure = error
            return replaced

        handles = [] if producer is None else [producer.register_forward_hook(produced)]
        return [*handles, consumer.register_forward_hook(consumed)]

    def _listen(self, seen: Watch, given: Tensor, output: Tensor) -> None:
        x: Tensor | None = None
        known = [(given.detach(), given._version)]
        if self.geometries[0] is not None:
            if not self.waiting:
                raise GrowthError(f"{self.place}: the consumer was called before, or more often than, the producer")
            x, version, made = self.waiting.popleft()
            known.append((x, version))
            self._check(given, made)
            if not self.looked and made.requires_grad:
                self.looked = True
                try:
                    seen.looking = True
                    self.sums.mixing = mixing_of(made, given, channels=1 if self.geometries[1].kernel else -1)
                finally:
                    seen.looking = False
        h = given.detach()

        def add(wanted: Tensor) -> None:
            if any(tensor._version != version for tensor, version in known):
                raise GrowthError(
                    f"{self.place}: what a layer of it reads was written over before the backward pass. Put the "
                    "operation that works in place somewhere else, or make it a copy (inplace=False)"
                )
            tensors = (None if x is None else x.to(self.dtype), h.to(self.dtype), wanted)
            add_pair(self.sums, self.geometries, tensors, self.proposal)

        output.register_hook(lambda gradient: seen.asked(self, gradient, add))

    def _check(self, given: Tensor, made: Tensor) -> None:
        if given.shape != made.shape:
            raise GrowthError(
                f"{self.place}: the producer makes {tuple(made.shape)} and the consumer reads {tuple(given.shape)}; "
                f"rows of one are not rows of the other. Pair(None, {self.place.consumer!r}) looks at the second alone"
            )

    place: Pair
    geometries: tuple[Geometry | None, Geometry]

    def moments(self) -> PairMoments:
        return pair_moments(self.place, self.sums, self.geometries, self.sums.samples)


class _SiteTap(_Tap):
    def __init__(self, place: Site, module: nn.Module, model: nn.Module):
        super().__init__(module, model)
        self.place, self.module = place, module
        self.shapes = {}
        self.convolves = any(isinstance(inner, CONVOLUTIONS) for inner in module.modules())
        width = next((p.shape[0] for p in reversed([*module.parameters()]) if p.dim()), 0)
        self.shapes = dict.fromkeys(("S", "M", "S_D"), (width, width))

    place: Site

    def hooks(self, seen: Watch) -> list[RemovableHandle]:
        def came_out(_: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not seen.begins(output):
                return None
            self.called += 1
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
                seen.failure = GrowthError(f"{self.place} returns no floating tensor of two axes or more")
                return None
            replaced = seen.listening(output)
            output = output if replaced is None else replaced
            if not output.requires_grad:
                self.without += 1
                return None
            axis = self.axis(output)
            held = output.detach().clone()  # a ReLU that works in place may stand behind

            def add(wanted: Tensor) -> None:
                rows = held.to(self.dtype).movedim(axis, -1)
                if self.sums.sums["S"].shape[0] != rows.shape[-1]:
                    if self.sums.samples:
                        raise GrowthError(f"{self.place} returns tensors of different numbers of channels")
                    shapes = dict.fromkeys(self.shapes, (rows.shape[-1], rows.shape[-1]))
                    self.sums.sums = Sums.zeros(shapes, held.device).sums
                add_site(self.sums, rows, wanted.movedim(axis, -1))

            output.register_hook(lambda gradient: seen.asked(self, gradient, add))
            return replaced

        return [self.module.register_forward_hook(came_out)]

    def axis(self, output: Tensor) -> int:
        """Of the channels."""
        if self.place.axis is not None:
            return self.place.axis
        return 1 if output.dim() > 3 or (self.convolves and output.dim() == 3) else -1

    def moments(self) -> SiteMoments:
        means = {name: total / self.sums.samples for name, total in self.sums.settle().items()}
        return SiteMoments(
            self.place,
            self.sums.samples,
            means["S"],
            means["M"],
            means["S_D"],
            self.sums.rows[0],
            self.sums.tolerance,
        )


def _paths(pair: Pair) -> tuple[str | None, str]:
    return pair.producer, pair.consumer


def _turns(every: int | tuple[int, int]) -> tuple[int, int]:
    few, many = every if isinstance(every, tuple) and len(every) == 2 else (1, every)
    if type(few) is not int or type(many) is not int or not 1 <= few <= many:
        raise GrowthError(f"statistics: every={every!r}: pass a whole number n (one step in n), or (m, n): m in n.")
    return few, many


FORWARD = -1


def _backward_pass() -> int:
    """A number of the backward pass that is running, in which an activation checkpoint may run a forward."""
    return torch._C._current_graph_task_id()


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{math.ceil(count):,} {unit}"
        count = math.ceil(count / 1024)
    raise AssertionError

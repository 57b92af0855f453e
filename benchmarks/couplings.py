"""Which entries of which tensors belong together? auxin, torch-pruning and torch-kirigami on the same networks.

    python3 -m venv peers
    peers/bin/pip install -c constraints/dev.txt torch-pruning torch-kirigami timm transformers safetensors
    PYTHONPATH=src peers/bin/python benchmarks/couplings.py [--only NAME ...] [--details]

(With a CPU, take torch from its index for CPUs.) The networks are those of ``tests/zoo`` and three below. The questions
are the outputs of all layers with weights, those of repeated blocks once and at most six of a network, without those
whose width is the network's own output. Each tool says what belongs to one unit of an output, and is judged by doing
what it says, in float64:

- auxin widens by the smallest step that fits; the network must run and give the same outputs.
- The peers remove one unit by their own means (or a head, or one of each group, where that alone works), on a copy
  whose tensors hold serial numbers, so that what is left tells what was removed. The smaller network must run. Either
  it gives what the whole network gives with those entries set to zero; or, where a norm over the width notices that
  entries are missing, two such units must be interchangeable in the whole network: swapped in all the tensors that the
  tool names, they change nothing.

"refused" is an error of the tool's own kind or a layer that it does not know; "crashed" any other error, before it has
an answer. Activations that work in place are told not to, since torch-kirigami refuses them. The seconds are processor
time for the analysis and all its answers, first and again; 20 of them at most, and 8 for a question.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import importlib.metadata
import io
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import auxin as ax
from auxin.anatomy.probe import PlanContext, moved, tensors_in, untouched
from auxin.anatomy.widths.groups import by_steps, closure, output_axis, trace_of
from auxin.anatomy.widths.tried import standing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))

NETWORKS = """unet lstm gated resnet18 resnet50 densenet121 dla34 efficientnet_b0 mobilenetv2_050 mnasnet_050
    regnetx_002 convnext_atto nfnet_l0 rexnet_100 repvit_m0_9 vit_tiny_patch16_224 swin_tiny_patch4_window7_224 llama
    mistral gpt2 gpt_neox opt phi mixtral bert distilbert t5 bart vit""".split()
TOOLS = ("auxin", "torch-pruning", "torch-kirigami")
LIMITS = 20, 8  # processor seconds for an analysis, and for one question
MOST = 6  # questions
Removed = dict[tuple[str, int], list[int]]


class Unet(nn.Module):
    """Two scales, group norms, a skip connection that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(4, 32), nn.Conv2d(32, 24, 3, padding=1)
        self.up, self.merge = nn.ConvTranspose2d(24, 12, 2, stride=2), nn.Conv2d(28, 20, 3, padding=1)
        self.leave = nn.Conv2d(20, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.enter(x))
        x = torch.relu(self.middle(F.silu(self.norm(self.down(wide)))))
        return self.leave(torch.relu(self.merge(torch.cat([wide, self.up(x)], 1))))


class Tagger(nn.Module):
    """An embedding, an LSTM, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(40, 12), nn.Linear(16, 10)
        self.lstm, self.out = nn.LSTM(12, 16, num_layers=2, batch_first=True), nn.Linear(10, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.lstm(self.embed(ids))[0])))


class Gated(nn.Module):
    """A fused gate and up projection, a fused projection to queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_size = 4, 4
        self.enter, self.qkv, self.mix = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.both, self.down, self.out = (
            nn.RMSNorm(16),
            nn.Linear(16, 48),
            nn.Linear(24, 16),
            nn.Linear(16, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q = q.reshape(batch, length, self.heads, -1).transpose(1, 2)
        k = k.reshape(batch, length, self.heads, -1).transpose(1, 2)
        v = v.reshape(batch, length, self.heads, -1).transpose(1, 2)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        return self.out(x + self.down(F.silu(gate) * up))


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "unet": (Unet, lambda: torch.randn(2, 3, 16, 16)),
    "lstm": (Tagger, lambda: torch.randint(40, (2, 7))),
    "gated": (Gated, lambda: torch.randn(2, 5, 6)),
}


class Network:
    """A network in float64 and a call of it."""

    def __init__(self, name: str):
        if name in OWN:
            torch.manual_seed(0)
            build, batch = OWN[name]
            self.model, self.args, self.kwargs = build().eval(), (batch(),), {}
        else:
            from models import build as of_the_zoo

            self.model, self.args, self.kwargs = of_the_zoo(name)
        self.model.double()
        for module in self.model.modules():  # torch-kirigami refuses activations that work in place
            if getattr(module, "inplace", False) is True:
                module.inplace = False
        wide = (torch.float32, torch.float64)
        self.args = tuple(moved(list(self.args), torch.device("cpu"), wide))
        self.kwargs = moved(self.kwargs, torch.device("cpu"), wide)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Floating tensors that a copy gives."""
        with torch.no_grad():
            return [t for t in tensors_in(model(*self.args, **self.kwargs)) if t.is_floating_point()]

    def units(self, path: str) -> list[tuple[list[int], list[int]]]:
        """Two units of an output, in each way in which they may be counted: entries, heads, one of each group."""
        found = [(list(range(size)), list(range(size, 2 * size))) for size in (1, self.head_size) if size]
        own = vars(self.model.get_submodule(path))
        names = ("out_channels", "out_features", "embedding_dim", "nf", "hidden_size")
        width = next((own[name] for name in names if name in own), 0)
        if width % 3 == 0 and self.head_size:  # a fused projection to queries, keys and values
            thirds = [[third * width // 3 + entry for third in range(3) for entry in pair] for pair in found[-1]]
            found.append((thirds[0], thirds[1]))
        for module in self.model.modules():
            groups = vars(module).get("num_groups", vars(module).get("groups", 1))
            if 1 < groups < width and width % groups == 0 and width // groups > 1:
                first = list(range(0, width, width // groups))
                found.append((first, [entry + 1 for entry in first]))
        return [pair for number, pair in enumerate(found) if pair not in found[:number]][:5]

    @property
    def head_size(self) -> int:
        """Of attention, where a configuration or a module says it; 0 elsewhere."""
        config = getattr(self.model, "config", None)
        if config is None:
            sizes = (vars(m).get("head_size", vars(m).get("head_dim")) for m in self.model.modules())
            return next((size for size in sizes if type(size) is int), 0)
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0
        size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        return int(size or (getattr(config, "hidden_size", 0) // heads if heads else 0))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers, ties under each name."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in held if tensor.is_floating_point()}


def layers(model: nn.Module) -> list[str]:
    """Those that may be asked about: with a weight or recurrent; of repeated blocks the first."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase))
        if kind or type(module).__name__ == "Conv1D":
            found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), path)
    return list(found.values())


# ---- the truth about the peers


def numbered(model: nn.Module) -> dict[str, Tensor]:
    """Let every floating tensor hold the numbers of its entries; gives what they held."""
    held = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    with torch.no_grad():
        for tensor in tensors_of(model).values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    return held


def removed_from(small: nn.Module, held: dict[str, Tensor]) -> Removed:
    """By name and axis the entries that are gone; the smaller network gets its own values back."""
    found: Removed = {}
    with torch.no_grad():
        for name, tensor in tensors_of(small).items():
            numbers, old = tensor.detach().long(), held[name]
            if numbers.shape != old.shape or not numbers.equal(torch.arange(old.numel()).view(old.shape)):
                for axis, at in enumerate(torch.unravel_index(numbers.flatten(), old.shape)):
                    gone = torch.ones(old.shape[axis], dtype=torch.bool).index_fill_(0, at, False)
                    if gone.any():
                        found[name, axis] = gone.nonzero().flatten().tolist()
            tensor.data = old.flatten()[numbers.flatten()].view(numbers.shape)
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal up to rounding; norms of many models compute in float32 inside."""
    shapes = [t.shape for t in a] == [t.shape for t in b]
    return shapes and all(float((x - y).norm()) <= 1e-5 * float(x.norm()) for x, y in zip(a, b, strict=True))


def zeroed(model: nn.Module, removed: Removed) -> nn.Module:
    """A copy with those entries at zero."""
    other = copy.deepcopy(model)
    tensors = tensors_of(other)
    with torch.no_grad():
        for (name, axis), gone in removed.items():
            tensors[name].index_fill_(axis, torch.tensor(gone), 0)
    return other


def swapped(model: nn.Module, one: Removed, two: Removed) -> nn.Module | None:
    """A copy with two units interchanged; None where they are not alike."""
    if {key: len(gone) for key, gone in one.items()} != {key: len(gone) for key, gone in two.items()}:
        return None
    other, done = copy.deepcopy(model), set()
    tensors = tensors_of(other)
    with torch.no_grad():
        for (name, axis), gone in one.items():
            tensor = tensors[name]
            if (tensor.data_ptr(), axis) not in done:
                done.add((tensor.data_ptr(), axis))
                order = torch.arange(tensor.shape[axis])
                order[gone], order[two[name, axis]] = torch.tensor(two[name, axis]), torch.tensor(gone)
                tensor.copy_(tensor.index_select(axis, order))
    return other


def judged(
    network: Network, prune: Callable[[list[int]], tuple[nn.Module, Removed]], first: list[int], second: list[int]
) -> str:
    """Remove a unit, and judge it."""
    small, removed = prune(first)
    try:
        after = network.outputs(small)
    except Exception as error:
        return f"wrong: does not run: {type(error).__name__}: {str(error)[:90]}"
    if not removed:
        return "wrong: nothing was removed"
    if same(network.outputs(zeroed(network.model, removed)), after):
        return "right"
    try:
        _, other = prune(second)
    except Exception as error:
        return f"wrong: {type(error).__name__} for the second unit"
    mixed = swapped(network.model, removed, other)
    if mixed is not None and same(network.outputs(network.model), network.outputs(mixed)):
        return "right"
    return "wrong: another function"


# ---- the tools


class TorchPruning:
    """A ``DependencyGraph`` of torch-pruning; one layer after the other, the network put back in between."""

    def __init__(self, network: Network):
        import torch_pruning

        self.library, self.network = torch_pruning, network
        self.model = copy.deepcopy(network.model)
        self.analyse()

    def analyse(self) -> None:
        given = self.network.kwargs or self.network.args
        self.graph = self.library.DependencyGraph().build_dependency(
            self.model,
            given,
            output_transform=lambda out: [t for t in tensors_in(out) if t.requires_grad],
            verbose=False,
        )

    def group(self, path: str, entries: list[int]) -> Any:
        module = self.model.get_submodule(path)
        pruner = self.graph.get_pruner_of_module(module)
        if pruner is None or module not in self.graph.module2node:
            raise Refused(f"{type(module).__name__} is not known")
        group = self.graph.get_pruning_group(module, pruner.prune_out_channels, entries)
        if not self.graph.check_pruning_group(group):
            raise Refused("nothing would be left")
        return group

    def pruned(self, path: str, entries: list[int]) -> tuple[nn.Module, Removed]:
        group = self.group(path, entries)
        bare = any(isinstance(dep.target.module, nn.Parameter) for dep, _ in group)
        with putting_back(self.model):
            held = numbered(self.model)
            group.prune(record_history=False)
            small = copy.deepcopy(self.model)
        for name, tensor in tensors_of(self.model).items():
            tensor.data = held[name]
        if bare:  # the graph has taken other parameters for its own
            self.analyse()
        return small, removed_from(small, held)


class Kirigami:
    """A ``DependencyGraph`` of torch-kirigami, and plans that are applied to copies."""

    def __init__(self, network: Network):
        from torch_kirigami import DependencyGraph, KirigamiError, pruning

        self.refusals, self.pruning, self.network = KirigamiError, pruning, network
        try:
            self.graph = DependencyGraph.build(network.model, args=network.args, kwargs=network.kwargs)
        except KirigamiError as error:
            raise Refused(str(error)) from error
        self.pruner = pruning.Pruner(network.model, graph=self.graph)
        self.plans: dict[tuple[str, ...], Any] = {}

    def group(self, path: str, entries: list[int]) -> Any:
        key = path, *map(str, entries)
        if key not in self.plans:
            self.plans[key] = self._plan(path, entries)
        return self.plans[key]

    def _plan(self, path: str, entries: list[int]) -> Any:
        module = self.network.model.get_submodule(path)
        axis = 1 if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D" else 0
        axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else axis
        if isinstance(module, nn.RNNBase):
            return self._declared(path, entries)
        try:
            return self.pruner.plan_remove([self.graph.parameter(f"{path}.weight").axis(axis).select(entries)])
        except self.refusals as error:
            if len(entries) > 1:
                raise Refused(str(error)) from error
            return self._declared(path, entries)

    def _declared(self, path: str, entries: list[int]) -> Any:
        """The unit that the library itself offers at this layer."""
        try:
            space = self.pruner.discover_candidates(targets=[path])
            return self.pruner.plan_remove(space.candidates[entries[0]].remove)
        except (self.refusals, IndexError) as error:
            raise Refused(str(error)) from error

    def pruned(self, path: str, entries: list[int]) -> tuple[nn.Module, Removed]:
        plan, small = self.group(path, entries), copy.deepcopy(self.network.model)
        held = numbered(small)
        self.pruning.Pruner(small).apply(plan)
        return small, removed_from(small, held)


class Refused(Exception):
    """A tool says no."""


class OutOfTime(BaseException):
    """It takes too long; nobody else's ``except Exception`` shall take it for his own."""


@contextlib.contextmanager
def putting_back(model: nn.Module) -> Iterator[None]:
    """Attributes and tensors of all modules afterwards as they are now."""
    held = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, own, parameters, buffers in held:
            module.__dict__.clear()
            module.__dict__.update(own)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


PEERS: dict[str, Any] = {"torch-pruning": TorchPruning, "torch-kirigami": Kirigami}


def of_peer(network: Network, kind: Any, paths: list[str]) -> tuple[dict[str, str], list[float]]:
    """What becomes of each layer, and the seconds."""
    seconds = []
    for _ in range(2):
        start = time.process_time()
        try:
            with limited(LIMITS[0]):
                tool = kind(network)
                for path in paths:
                    with contextlib.suppress(Exception):
                        tool.group(path, network.units(path)[0][0])
        except BaseException as error:
            if not isinstance(error, (Exception, OutOfTime)):
                raise
            word = "refused" if isinstance(error, Refused) else f"crashed: {type(error).__name__}"
            return {path: f"{word}: {error}" for path in paths}, [time.process_time() - start]
        seconds.append(time.process_time() - start)
    return {path: of_layer(network, tool, path) for path in paths}, seconds


def of_layer(network: Network, tool: Any, path: str) -> str:
    """The best of the ways to count a unit."""
    found = []
    for first, second in network.units(path):
        try:
            with limited(LIMITS[1]):
                found.append(judged(network, lambda entries: tool.pruned(path, entries), first, second))
        except OutOfTime as error:
            return f"crashed: {error}"
        except Refused as error:
            found.append(f"refused: {error}")
        except Exception as error:
            found.append(f"crashed: {type(error).__name__}: {error}")
        if found[-1] == "right":
            return "right"
    return found[0]


def of_auxin(network: Network, paths: list[str]) -> tuple[dict[str, str], list[float]]:
    """The same for auxin."""
    model = copy.deepcopy(network.model)  # of which nothing is remembered
    context = PlanContext(model, probe_of(network))
    seconds = []
    for _ in range(2):
        start = time.process_time()
        trace = trace_of(context)
        for path in paths:
            with contextlib.suppress(ax.GrowthError):
                for atom, _ in by_steps(output_axis(trace, model, path)):
                    closure(trace, [(atom, 1)])
        seconds.append(time.process_time() - start)
    results = {}
    for path in paths:
        try:
            found = [widened(context, ax.Widen(path, by=step)) for step in steps_of(context, path)]
        except ax.GrowthError as error:
            found = [f"refused: {error}"]
        results[path] = "right" if "right" in found else [*found, "refused: no width"][0]
    return results, seconds


def probe_of(network: Network) -> Any:
    """The call as a probe."""
    return network.kwargs or network.args


def steps_of(context: PlanContext, path: str) -> list[int]:
    """How many entries of an output come at least, in each way in which it may grow; the smallest first."""
    trace = trace_of(context)
    term = output_axis(trace, context.model, path)
    size = closure(trace, []).length(term)
    return sorted({closure(trace, [(atom, 1)]).length(term) - size for atom, _ in by_steps(term)})


def widened(context: PlanContext, edit: ax.Widen) -> str:
    """Plan it, and run the network with the wider tensors."""
    try:
        change = edit.plan(context.model, context)
    except ax.GrowthError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"
    before = [t for t in context.outputs or [] if t.is_floating_point()]
    with untouched(context.model), standing(context.model, change.swaps, change.assigns), torch.no_grad():
        after = [t for t in tensors_in(context.run()) if t.is_floating_point()]
    return "right" if same(before, after) else "wrong: another function"


def asked(network: Network) -> list[str]:
    """Layers whose width is not the network's own output."""
    context = PlanContext(network.model, probe_of(network))
    found = []
    for path in layers(network.model):
        try:
            trace = trace_of(context)
            steps = by_steps(output_axis(trace, network.model, path))
            inside = [not closure(trace, [(atom, 1)]).reaches_output for atom, _ in steps]
        except ax.GrowthError:
            inside = [True]  # a layer that did not run, or that auxin does not know
        if any(inside):
            found.append(path)
    return [found[number * len(found) // MOST] for number in range(MOST)] if len(found) > MOST else found


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise OutOfTime when it takes more processor time."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def of_network(name: str, details: bool, sums: dict[str, collections.Counter[str]]) -> None:
    """Print a line for each tool."""
    network = Network(name)
    paths = asked(network)
    for tool in TOOLS:
        with contextlib.redirect_stdout(io.StringIO()):
            results, seconds = of_auxin(network, paths) if tool == "auxin" else of_peer(network, PEERS[tool], paths)
        counts = collections.Counter(result.partition(":")[0] for result in results.values())
        sums[tool].update(counts)
        told = " | ".join(str(counts[word]) for word in ("right", "wrong", "refused", "crashed"))
        print(f"| {name} | {tool} | {told} | {', '.join(f'{s:.2f}' for s in seconds)} |", flush=True)
        if details:
            for path, result in results.items():
                if result != "right":
                    print(f"    {path}: {' '.join(result.split())[:230]}", flush=True)


def main() -> None:
    """Print the table, and the sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--details", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in (*TOOLS[1:], "timm", "transformers"))
    print(f"{time.strftime('%d %B %Y')}, torch {torch.__version__}, {versions}, Python {platform.python_version()}")
    print("| network | tool | right | wrong | refused | crashed | seconds of analysis: first, again |")
    print("|---|---|---|---|---|---|---|")
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name in args.only or NETWORKS:
        of_network(name, args.details, sums)
    for tool, counts in sums.items():
        told = " | ".join(str(counts[word]) for word in ("right", "wrong", "refused", "crashed"))
        print(f"| all | {tool} | {told} | |")


if __name__ == "__main__":
    main()
